"""Parts: every item once, as even as their bounds say, as the functions promise that users import."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.utils import bins
from miles.utils.seqlen_balancing import (
    expand_bins_by_splitting,
    first_fit_decreasing_pack,
    first_fit_pack,
    get_reverse_idx,
    get_seqlen_balanced_partitions,
    greedy_partition,
    karmarkar_karp,
)

weights = st.lists(st.integers(0, 100), min_size=1, max_size=40)


def heaviest(parts, given):
    return max(sum(given[i] for i in part) for part in parts)


@given(weights, st.integers(1, 8), st.booleans(), st.sampled_from([karmarkar_karp, greedy_partition, None]))
def test_parts_have_every_item_once(given, parts, equal, method):
    balance = method or get_seqlen_balanced_partitions
    if len(given) < parts or (equal and len(given) % parts):
        with pytest.raises(ValueError, match="cannot be"):
            balance(given, parts, equal)
        return
    found = balance(given, parts, equal)
    assert len(found) == parts
    assert sorted(i for part in found for i in part) == list(range(len(given)))
    if equal:
        assert {len(part) for part in found} == {len(given) // parts}
    if method is None:
        assert all(found)
        assert found == balance(np.array(given, np.float64), parts, equal)


@given(weights, st.integers(1, 8))
def test_no_part_is_heavier_than_the_mean_and_one_item_or_than_any_one_method_makes_it(given, parts):
    if len(given) < parts:
        return
    found = heaviest(get_seqlen_balanced_partitions(given, parts, equal_size=False), given)
    assert found <= max(sum(given) / parts + max(given) * (1 - 1 / parts), *given)
    for method in (karmarkar_karp, greedy_partition):
        assert found <= heaviest(method(given, parts, equal_size=False), given)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_parts_are_at_most_a_third_heavier_than_the_best_there_are(given, parts):
    if len(given) < parts:
        return
    best = min(
        max(sum(w for w, part in zip(given, choice, strict=True) if part == p) for p in range(parts))
        for choice in product(range(parts), repeat=len(given))
    )
    assert heaviest(get_seqlen_balanced_partitions(given, parts, equal_size=False), given) <= best * (4 / 3)


def test_differencing_finds_what_the_heaviest_first_does_not():
    given = [8, 7, 6, 5, 4]
    assert heaviest(karmarkar_karp(given, 2, equal_size=False), given) == 16  # 8+6 and 7+5+4, as published
    assert heaviest(greedy_partition(given, 2, equal_size=False), given) == 17


def test_differencing_by_layers_lays_the_heavy_on_the_light():
    given = [40, 31, 22, 21, 12, 11]
    assert sorted(karmarkar_karp(given, 3, equal_size=True)) == [[0, 5], [1, 4], [2, 3]]
    assert heaviest(karmarkar_karp([9, 9, 7, 5, 4, 2], 2, equal_size=True), [9, 9, 7, 5, 4, 2]) == 18


def test_one_giant_among_parts_of_equal_size_gets_the_lightest_companions():
    given = [1000, *range(1, 16)]
    parts = get_seqlen_balanced_partitions(given, 4, equal_size=True)
    giants = next(part for part in parts if 0 in part)
    assert sum(given[i] for i in giants) == 1000 + 1 + 2 + 3


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 100), st.booleans())
def test_first_fit_uses_no_two_bins_where_one_would_do(lengths, capacity, decreasing):
    found = (first_fit_decreasing_pack if decreasing else first_fit_pack)(lengths, capacity)
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in part) for part in found]
    assert all(total <= capacity or len(part) == 1 for total, part in zip(sums, found, strict=True))
    smallest = sorted(sums)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity


def test_first_fit_takes_sequences_as_they_come_or_the_longest_first():
    assert first_fit_pack([4, 8, 6, 2], 10) == [[0, 2], [1, 3]]
    assert first_fit_decreasing_pack([3, 4, 8, 5], 10) == [[2], [3, 1], [0]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 100))
def test_best_fit_needs_at_most_eleven_ninths_of_the_bound_and_keeps_to_the_capacity(lengths, capacity):
    labels, count = bins.best_fit_decreasing(np.array(lengths, np.int64), capacity)
    parts = bins.members(labels, count)
    assert all(parts)
    assert all(sum(lengths[i] for i in part) <= capacity or len(part) == 1 for part in parts)
    assert count <= len(first_fit_decreasing_pack(lengths, capacity)) + 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 16))
def test_no_packing_has_fewer_bins_than_the_bound(lengths, capacity):
    def fits(count):
        for choice in product(range(count), repeat=len(lengths)):
            mine = [[w for w, bin_ in zip(lengths, choice, strict=True) if bin_ == b] for b in range(count)]
            if all(sum(bin_) <= capacity or len(bin_) == 1 for bin_ in mine):
                return True
        return False

    fewest = next(count for count in range(1, len(lengths) + 1) if fits(count))
    array = np.array(lengths, np.int64)
    assert bins.fewest_bins(array, capacity) <= fewest
    _, found = bins.pack(array, capacity)
    assert fewest <= found <= fewest + 1


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 70), st.integers(1, 4), st.integers(0, 50))
def test_packed_bins_keep_to_capacity_and_numbers(lengths, capacity, multiple, at_least):
    labels, count = bins.pack(np.array(lengths, np.int64), capacity, multiple, at_least)
    parts = bins.members(labels, count)
    assert count % multiple == 0
    assert count >= at_least
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= capacity or len(part) == 1 for part in parts)
    assert all(parts) or max(map(len, parts), default=1) <= 1


def test_packed_bins_are_even_if_they_can_be():
    labels, count = bins.pack(np.array([6, 6, 3, 3, 3, 3]), 13)
    assert count == 2
    assert bins.sums(labels, np.array([6, 6, 3, 3, 3, 3]), 2).tolist() == [12.0, 12.0]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 70), st.integers(0, 40))
def test_splitting_goes_on_until_there_are_enough_parts_or_single_items(lengths, capacity, target):
    parts = first_fit_decreasing_pack(lengths, capacity)
    before = len(parts)
    largest = heaviest(parts, lengths)
    expand_bins_by_splitting(parts, target, lengths)
    assert len(parts) == max(before, min(target, len(lengths)))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(parts)
    assert heaviest(parts, lengths) <= largest


@given(st.permutations(range(12)))
def test_a_reverse_index_leads_back(permutation):
    values = [chr(ord("a") + i) for i in range(12)]
    moved = [values[i] for i in permutation]
    assert [moved[i] for i in get_reverse_idx(permutation)] == values


def test_many_items_in_few_bins_are_even_without_layers():
    """Whose number would be squared: a hundred thousand samples for two bins took minutes."""
    weights = np.random.default_rng(0).lognormal(6.0, 1.0, 100_000)
    sums = np.bincount(bins.balanced(weights, 2), weights, minlength=2)
    assert sums.max() / sums.mean() < 1.0001
