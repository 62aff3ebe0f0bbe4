"""Log-probabilities and entropy of sharded logits equal those of whole ones, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import run_ranks

from miles.backends.training_utils.loss_hub.math_utils import compute_approx_kl, log_probs_and_entropy

ROWS, VOCAB = 7, 12


def plain(logits, rows, targets, temperature, vocab_size):
    p = torch.log_softmax(logits[:, :vocab_size][rows].double() / temperature, -1)
    return p.gather(1, targets[:, None])[:, 0], -(p.exp() * p).sum(-1)


def inputs(seed, vocab_size=VOCAB, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCAB, generator=generator) * spread
    rows = torch.tensor([0, 2, 2, 5, 6])
    targets = torch.randint(vocab_size, (len(rows),), generator=generator)
    weights = torch.randn(2, len(rows), generator=generator)
    return logits, rows, targets, weights


def gradient_of(function, logits, weights):
    logits = logits.clone().requires_grad_()
    log_probs, entropy = function(logits)
    ((log_probs * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    return log_probs.detach(), entropy.detach(), logits.grad


CASES = [(1.0, 12, -1, 3.0), (0.6, 10, 2, 3.0), (1.0, 4, 1, 1.0), (2.0, 12, -1, 200.0)]
"""Temperature, vocabulary without padding, rows of a chunk, spread of the logits."""


def sharded():
    return [sharded_case(*case) for case in CASES]


def sharded_case(temperature, vocab_size, chunk_size, spread):
    logits, rows, targets, weights = inputs(1, vocab_size, spread)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    width = VOCAB // world
    mine = logits[:, rank * width : (rank + 1) * width].clone()
    before = mine.clone()
    answer = gradient_of(
        lambda shard: log_probs_and_entropy(
            shard,
            rows,
            targets,
            temperature=temperature,
            vocab_size=vocab_size,
            tp_group=torch.distributed.group.WORLD,
            chunk_size=chunk_size,
        ),
        mine,
        weights,
    )
    assert torch.equal(mine, before)
    return answer


@pytest.mark.parametrize("world", [2, 3])
def test_shards_give_what_the_whole_gives(world):
    by_rank = run_ranks(world, sharded)
    for (temperature, vocab_size, _, spread), *answers in zip(CASES, *by_rank, strict=True):
        logits, rows, targets, weights = inputs(1, vocab_size, spread)
        log_probs, entropy, gradient = gradient_of(
            lambda whole: plain(whole, rows, targets, temperature, vocab_size),  # noqa: B023 - called at once
            logits,
            weights,
        )
        for found_log_probs, found_entropy, _ in answers:
            torch.testing.assert_close(found_log_probs.double(), log_probs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found_entropy.double(), entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([a[2] for a in answers], 1), gradient, rtol=1e-5, atol=1e-5)


LONG_ROWS, WIDE = 600, 1 << 14


def in_chunks_of_the_devices_choice():
    """The last rank's shard ends in padding, so fewer of its columns are worked on."""
    logits = torch.randn(LONG_ROWS, WIDE, generator=torch.Generator().manual_seed(3))
    rank = torch.distributed.get_rank()
    mine = logits[:, rank * WIDE // 2 : (rank + 1) * WIDE // 2].contiguous()
    targets = torch.arange(LONG_ROWS)
    log_probs, _ = log_probs_and_entropy(
        mine, targets, targets, vocab_size=WIDE - 200, tp_group=torch.distributed.group.WORLD, with_entropy=False
    )
    return log_probs, logits[:, : WIDE - 200].log_softmax(-1).gather(1, targets[:, None])[:, 0]


def test_ranks_meet_for_the_same_rows_though_one_has_padding():
    for found, wanted in run_ranks(2, in_chunks_of_the_devices_choice):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 1.7]), st.integers(2, VOCAB), st.sampled_from([-1, 1, 3]))
def test_one_rank_gives_what_log_softmax_gives(seed, temperature, vocab_size, chunk_size):
    logits, rows, targets, weights = inputs(seed, vocab_size)
    wanted = gradient_of(lambda whole: plain(whole, rows, targets, temperature, vocab_size), logits, weights)
    found = gradient_of(
        lambda whole: log_probs_and_entropy(
            whole, rows, targets, temperature=temperature, vocab_size=vocab_size, chunk_size=chunk_size
        ),
        logits,
        weights,
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_log_probabilities_alone_have_a_gradient():
    logits, rows, targets, _ = inputs(3)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    log_probs, entropy = log_probs_and_entropy(ours, rows, targets, with_entropy=False)
    assert entropy is None
    log_probs.sum().backward()
    plain(theirs, rows, targets, 1.0, VOCAB)[0].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_worked_on_in_float32():
    logits, rows, targets, _ = inputs(3)
    narrow = logits.bfloat16().requires_grad_()
    log_probs, _ = log_probs_and_entropy(narrow, rows, targets)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), plain(narrow.detach().float(), rows, targets, 1.0, VOCAB)[0])
    log_probs.sum().backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16


def test_no_rows_give_no_values_and_a_gradient_of_zero():
    logits = torch.randn(3, VOCAB, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    log_probs, entropy = log_probs_and_entropy(logits, none, none)
    (log_probs.sum() + entropy.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_kl_estimates_are_the_published_ones():
    policy, base = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    d = policy - base
    torch.testing.assert_close(compute_approx_kl(policy, base, "k1"), d)
    torch.testing.assert_close(compute_approx_kl(policy, base, "k2"), d**2 / 2)
    torch.testing.assert_close(compute_approx_kl(policy, base, "k3"), torch.exp(-d) - 1 + d)
    torch.testing.assert_close(compute_approx_kl(policy, base, "low_var_kl"), torch.exp(-d) - 1 + d)


def test_the_low_variance_estimate_stays_within_10():
    far = compute_approx_kl(torch.tensor([-50.0, 0.0]), torch.tensor([0.0, float("nan")]), "low_var_kl")
    assert far.tolist() == [10.0, 0.0]


def test_the_unbiased_estimate_is_weighted():
    policy, base, ratio = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([3.0])
    assert compute_approx_kl(policy, base, "k1", ratio).item() == 3.0


def test_an_unknown_estimate_is_named():
    with pytest.raises(ValueError, match="k9"):
        compute_approx_kl(torch.zeros(1), torch.zeros(1), "k9")
