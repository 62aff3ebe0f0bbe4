"""What losses of users import: names, and what they give for one rank per sample."""

import importlib

import pytest
import torch
from support.plain_losses import flags

from miles.backends.base import ParallelState
from miles.backends.training_utils import cp_utils
from miles.backends.training_utils.loss_hub.logit_processors import (
    get_log_probs_and_entropy,
    get_responses,
    get_values,
)
from miles.backends.training_utils.parallel import NoParallelState, get_parallel_state, set_parallel_state
from miles.utils.misc import CannotLoad, load_function

TOTALS, RESPONSES = [5, 3, 4], [3, 0, 1]


@pytest.fixture(autouse=True)
def one_rank():
    set_parallel_state(ParallelState())
    yield
    set_parallel_state(None)


@pytest.mark.parametrize(
    "path",
    [
        "loss.compute_advantages_and_returns", "cp_utils.get_sum_of_sample_mean", "data.RankData",
        "log_utils.rollout_metrics", "parallel.get_parallel_state", "loss_hub.advantages.get_grpo_returns",
        "loss_hub.corrections.vanilla_tis_function", "loss_hub.corrections.icepop_function",
        "loss_hub.losses.clipped_policy_loss", "loss_hub.logit_processors.get_responses",
        "loss_hub.math_utils.compute_approx_kl", "loss_hub.math_utils.compute_policy_loss",
    ],
)  # fmt: skip
def test_the_paths_are_there(path):
    module, _, name = f"miles.backends.training_utils.{path}".rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_what_is_not_there_says_what_it_is():
    with pytest.raises(CannotLoad, match="distillation over several tokens"):
        load_function("miles.backends.training_utils.loss_hub.opd.anything")


def test_the_parallel_state_has_the_fields_that_user_code_reads():
    set_parallel_state(ParallelState(tp_rank=1, tp_size=2, dp_rank=3, dp_size=4))
    state = get_parallel_state()
    assert (state.tp.rank, state.tp.size, state.tp.group) == (1, 2, None)
    assert (state.intra_dp.rank, state.effective_dp.size, state.dp.rank) == (3, 4, 3)
    assert (state.cp.size, state.cp_rank, state.pp.size, state.ep.size, state.etp.rank) == (1, 0, 1, 1, 0)
    assert state.is_pp_last_stage


def test_without_a_trainer_there_is_no_parallel_state():
    set_parallel_state(None)
    with pytest.raises(NoParallelState, match="set_parallel_state"):
        get_parallel_state()


def test_sums_of_sample_means_and_of_tokens():
    masks = [torch.tensor([1.0, 0.0, 1.0]), torch.zeros(0), torch.tensor([1.0])]
    values = torch.tensor([2.0, 100.0, 4.0, 5.0], requires_grad=True)
    mean = cp_utils.get_sum_of_sample_mean(TOTALS, RESPONSES, masks)(values)
    assert mean.item() == 3.0 + 5.0
    mean.backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 1.0]
    assert cp_utils.get_sum_of_sample_mean(TOTALS, RESPONSES, masks, True)(values).item() == 11.0


@pytest.mark.parametrize(
    ("total", "response", "logits", "tokens"),
    [
        (10, 4, ((0, 0), (5, 9)), ((0, 0), (6, 10))),
        (10, 8, ((1, 5), (5, 9)), ((2, 6), (6, 10))),
        (7, 3, ((3, 4), (4, 6)), ((4, 5), (5, 7))),
        (4, 0, ((0, 0), (0, 0)), ((0, 0), (0, 0))),
    ],
)
def test_offsets_of_two_chunks_cover_the_response(total, response, logits, tokens):
    size, chunks, found, places = cp_utils.get_logits_and_tokens_offset_with_cp(total, response)
    assert size == (total + 1) // 2
    assert chunks == ((0, size), (size, 2 * size))
    assert (found, places) == (logits, tokens)
    assert sum(end - start for start, end in places) == response


def test_offsets_of_a_padded_row():
    assert cp_utils.get_logits_and_tokens_offset_with_cp(5, 3, "bshd", 16)[0] == 8


def test_nothing_is_cut_or_gathered():
    values, masks = torch.arange(3.0), [torch.ones(3)]
    assert cp_utils.all_gather_with_cp(values, 5, 3) is values
    assert cp_utils.slice_log_prob_with_cp(values, 5, 3) is values
    assert cp_utils.slice_log_prob_with_cp([1.0], 5, 1) == [1.0]
    assert cp_utils.slice_with_cp(values, 0) is values
    assert cp_utils.slice_loss_masks_for_local_cp(masks, [5], [3]) is masks
    assert cp_utils.get_local_response_loss_masks([5], [3], masks) is masks


def test_a_padded_row_is_filled_up_by_a_number_or_a_function():
    rows = torch.ones(2, 3)
    assert cp_utils.slice_with_cp(rows, 7, "bshd", 4).tolist() == [[1.0] * 3] * 2 + [[7.0] * 3] * 2
    doubled = cp_utils.slice_with_cp(rows, lambda values, missing: torch.cat([values] * (1 + missing // 2)), "bshd", 4)
    assert doubled.shape == (4, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cp_utils.get_sum_of_sample_mean([2], [1], [torch.ones(1)]),
        lambda: cp_utils.get_logits_and_tokens_offset_with_cp(2, 1),
        lambda: cp_utils.all_gather_with_cp(torch.ones(1), 2, 1),
        lambda: cp_utils.slice_with_cp(torch.ones(2), 0),
        lambda: cp_utils.slice_log_prob_with_cp(torch.ones(1), 2, 1),
        lambda: cp_utils.slice_loss_masks_for_local_cp([torch.ones(1)], [2], [1]),
        lambda: list(get_responses(torch.ones(1, 2, 3), **of([2], [1]))),
        lambda: get_log_probs_and_entropy(torch.ones(1, 2, 3), **of([2], [1])),
    ],
)
def test_all_of_it_is_refused_with_context_parallelism(call):
    set_parallel_state(ParallelState(cp_size=2))
    with pytest.raises(cp_utils.NotWithContextParallelism, match="--context-parallel-size is 2"):
        call()


def of(totals, responses, **more):
    tokens = [torch.arange(total) for total in totals]
    return {"args": flags(), "unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": responses, **more}


@pytest.mark.parametrize("width", [None, 6])
def test_responses_and_their_log_probabilities(width):
    torch.manual_seed(1)
    shape = (1, sum(TOTALS) + 2, 12) if width is None else (len(TOTALS), width, 12)
    logits = torch.randn(shape, requires_grad=True)
    more = {} if width is None else {"max_seq_lens": [width] * len(TOTALS)}
    given = of(TOTALS, RESPONSES, **more)
    temperature = given["args"].rollout_temperature
    found = get_log_probs_and_entropy(logits, with_entropy=True, **given)
    flat, begin = logits.reshape(-1, 12) / temperature, 0
    chunks = list(get_responses(logits, **given))
    for number, (total, response) in enumerate(zip(TOTALS, RESPONSES, strict=True)):
        rows = flat[begin + total - response - 1 : begin + total - 1]
        tokens = torch.arange(total)[total - response :]
        torch.testing.assert_close(chunks[number][0], rows)
        assert chunks[number][1].tolist() == tokens.tolist()
        log_p = rows.log_softmax(-1)
        torch.testing.assert_close(found["log_probs"][number], log_p.gather(-1, tokens[:, None])[:, 0])
        torch.testing.assert_close(found["entropy"][number], -(log_p.exp() * log_p).sum(-1))
        begin += total if width is None else width
    assert found["log_probs"][0].requires_grad
    watched = get_log_probs_and_entropy(logits, with_entropy=True, entropy_requires_grad=False, **given)
    assert not watched["entropy"][0].requires_grad
    assert "entropy" not in get_log_probs_and_entropy(logits, **given)


def test_values_of_a_critic_have_no_temperature():
    output = torch.arange(12.0).reshape(1, 12, 1)
    found = get_values(output, **of(TOTALS, RESPONSES))
    assert [values.tolist() for values in found["values"]] == [[1.0, 2.0, 3.0], [], [10.0]]


def test_the_clipped_loss_as_user_code_calls_it():
    from miles.backends.training_utils.loss_hub.math_utils import compute_policy_loss

    ppo_kl, advantages = torch.tensor([0.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, -2.0])
    loss, clipped = compute_policy_loss(ppo_kl, advantages, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.0, -1.3, 1.6]))
    assert clipped.tolist() == [0.0, 1.0, 1.0]
    bounded, _ = compute_policy_loss(torch.tensor([-3.0]), torch.tensor([-1.0]), 0.2, 0.3, 2.0)
    assert bounded.tolist() == [2.0]
