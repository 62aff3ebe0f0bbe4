"""Putting sequences into bins: by capacity, or into a number of even parts.

Pure functions of numbers. A part is a list of places in what was given. The algorithms are in ``miles.utils.bins``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.utils import bins

Parts = list[list[int]]


def get_seqlen_balanced_partitions(seqlen_list: Sequence[float], k_partitions: int, equal_size: bool) -> Parts:
    """``k_partitions`` parts whose sums are close to each other, none of them empty.

    The best of three methods: the largest differencing method of Karmarkar and Karp (where it takes milliseconds), the
    same by layers, and the heaviest item first into the lightest part.

    Args:
        seqlen_list: Weight of each item: tokens, or FLOPs.
        k_partitions: Parts to make.
        equal_size: All parts get the same number of items, which must be a multiple of ``k_partitions``.

    Raises:
        ValueError: Fewer items than parts, or a number of items that cannot be dealt out evenly.
    """
    _check(len(seqlen_list), k_partitions, equal_size)
    limit = len(seqlen_list) // k_partitions if equal_size else None
    return bins.members(bins.balanced(_array(seqlen_list), k_partitions, limit), k_partitions)


def karmarkar_karp(seqlen_list: Sequence[float], k_partitions: int, equal_size: bool) -> Parts:
    """As ``get_seqlen_balanced_partitions``, by Karmarkar and Karp's method alone. Items of no weight may leave parts
    empty."""
    _check(len(seqlen_list), k_partitions, equal_size)
    method = bins.differencing_by_layers if equal_size else bins.karmarkar_karp_labels
    return bins.members(method(_array(seqlen_list), k_partitions), k_partitions)


def greedy_partition(seqlen_list: Sequence[float], k_partitions: int, equal_size: bool) -> Parts:
    """As ``get_seqlen_balanced_partitions``, by the heaviest item first into the lightest part, alone."""
    _check(len(seqlen_list), k_partitions, equal_size)
    limit = len(seqlen_list) // k_partitions if equal_size else None
    return bins.members(bins.heaviest_first(_array(seqlen_list), k_partitions, limit), k_partitions)


def first_fit_pack(total_lengths: Sequence[int], max_tokens_per_bin: int) -> Parts:
    """Bins of at most ``max_tokens_per_bin``: the sequences as they come, each into the first bin with room.

    A sequence that is longer than a bin gets one of its own.
    """
    parts: Parts = []
    room = np.zeros(len(total_lengths), np.int64)
    for place, length in enumerate(total_lengths):
        fits = room[: len(parts)] >= length
        at = int(fits.argmax()) if fits.any() else len(parts)
        if at == len(parts):
            parts.append([])
            room[at] = max_tokens_per_bin
        parts[at].append(place)
        room[at] -= length
    return parts


def first_fit_decreasing_pack(total_lengths: Sequence[int], max_tokens_per_bin: int) -> Parts:
    """As ``first_fit_pack``, the longest sequence first: at most 11/9 of the fewest bins, and one (Johnson, 1973)."""
    order = sorted(range(len(total_lengths)), key=lambda i: (-total_lengths[i], i))
    parts = first_fit_pack([total_lengths[i] for i in order], max_tokens_per_bin)
    return [[order[i] for i in part] for part in parts]


def expand_bins_by_splitting(parts: Parts, target_count: int, lengths: Sequence[float]) -> None:
    """Split the heaviest part that has two sequences, in place and again and again, until there are ``target_count``
    parts, or each has one sequence."""
    places = [place for part in parts for place in part]
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    weights = _array([lengths[place] for place in places])
    count = min(max(target_count, len(parts)), len(places) + sum(not part for part in parts))
    found = bins.split_heaviest(labels, weights, len(parts), count)
    parts[:] = [[places[i] for i in part] for part in bins.members(found, count)]


def get_reverse_idx(idx_map: Sequence[int]) -> list[int]:
    """Where each place went: the inverse of a permutation."""
    inverse = [0] * len(idx_map)
    for place, index in enumerate(idx_map):
        inverse[index] = place
    return inverse


def _check(count: int, k_partitions: int, equal_size: bool) -> None:
    if k_partitions < 1 or count < k_partitions:
        raise ValueError(f"{count} items cannot be put into {k_partitions} parts")
    if equal_size and count % k_partitions:
        raise ValueError(f"{count} items cannot be dealt out evenly to {k_partitions} parts")


def _array(weights: Sequence[float]) -> bins.Weights:
    array = np.asarray(weights)
    return array.astype(np.int64) if array.dtype.kind in "bui" else array.astype(np.float64)
