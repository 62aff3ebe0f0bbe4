"""The zigzag layout: all ranks together have each token once, and each response token is predicted by one row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.backends.training_utils.sequence_layout import SequenceLayout

sizes = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw):
    lengths = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    cp, multiple = draw(sizes), draw(st.sampled_from([1, 2, 3, 4, 8]))
    return [SequenceLayout(lengths, cp, rank, multiple) for rank in range(cp)]


@given(layouts())
def test_ranks_have_all_tokens_once_in_rows_of_the_same_length(ranks):
    total = sum(ranks[0].lengths)
    tokens = torch.arange(total) + 1
    rows = [layout.local_tokens(tokens) for layout in ranks]
    assert {len(row) for row in rows} == {ranks[0].num_rows}
    assert ranks[0].num_rows % ranks[0].multiple == 0
    kept = torch.cat(rows)
    assert sorted(kept[kept > 0].tolist()) == tokens.tolist()


@given(layouts())
def test_gathered_rows_come_back_in_order(ranks):
    layout = ranks[0]
    tokens = torch.arange(sum(layout.lengths)) + 1
    whole = torch.cat([rank.local_tokens(tokens) for rank in ranks])[layout.gathered_index]
    bounds, start = layout.cu_seqlens.tolist(), 0
    for number, length in enumerate(layout.lengths):
        sample = whole[bounds[number] : bounds[number + 1]]
        assert sample[:length].tolist() == tokens[start : start + length].tolist()
        assert not sample[length:].any()
        start += length


@given(layouts(), st.data())
def test_each_response_token_is_predicted_by_the_row_before_it(ranks, data):
    lengths = ranks[0].lengths
    responses = [data.draw(st.integers(0, length - 1)) for length in lengths]
    tokens = torch.arange(sum(lengths)) + 1
    found = {}
    for layout in ranks:
        rows, places = layout.predicting_rows(responses)
        local = layout.local_tokens(tokens)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            assert place not in found
            found[place] = int(local[row])
    # Token numbers count through, so the one before a response token is smaller by one.
    wanted, start = [], 0
    for length, response in zip(lengths, responses, strict=True):
        wanted += [start + length - response + t for t in range(response)]
        start += length
    assert [found[place] for place in range(len(found))] == wanted


def test_chunks_are_dealt_out_so_that_causal_attention_costs_the_same():
    ranks = [SequenceLayout((7,), 2, rank) for rank in range(2)]
    assert [layout.local_tokens(torch.arange(7) + 1).tolist() for layout in ranks] == [[1, 2, 7, 0], [3, 4, 5, 6]]


@pytest.mark.parametrize("multiple", [1, 4])
def test_one_rank_changes_nothing_but_the_tail(multiple):
    layout = SequenceLayout((3, 2), multiple=multiple)
    row = layout.local_tokens(torch.arange(5) + 1)
    assert row.tolist() == [1, 2, 3, 4, 5] + [0] * (0 if multiple == 1 else 3)
    assert layout.is_whole == (multiple == 1)
