"""Sequence-level parts of losses against float64 loops, with their gradients."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.backends.training_utils.loss_hub import sequence_level


@st.composite
def batches(draw):
    """Log-ratios, advantages and masks of some samples; what is not trained may be infinite."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ratios = [torch.randn(n, generator=generator) for n in lengths]
    masks = [(torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))).float() for n in lengths]
    if draw(st.booleans()):
        ratios = [torch.where(m > 0, r, torch.inf) for r, m in zip(ratios, masks, strict=True)]
    advantages = [torch.randn(n, generator=generator) for n in lengths]
    return ratios, advantages, masks


def mean_of(ratio, mask):
    kept = [r for r, m in zip(ratio.double().tolist(), mask.tolist(), strict=True) if m]
    return sum(kept) / max(len(kept), 1)


@given(batches())
@settings(deadline=None)
def test_gspo_has_one_ratio_per_sequence(batch):
    ratios, _, masks = batch
    found = sequence_level.gspo_kl(ratios, masks, torch.zeros(0))
    wanted = [mean_of(r, m) for r, m in zip(ratios, masks, strict=True) for _ in range(len(r))]
    assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(found.tolist(), wanted, strict=True))


def test_gspos_gradient_is_shared_by_the_tokens_that_are_trained():
    ratio = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    sequence_level.gspo_kl([ratio], [mask], ratio)[0].backward()
    assert torch.allclose(ratio.grad, mask / 3)


@given(batches(), st.sampled_from([-0.5, 0.0, 0.3]))
@settings(deadline=None)
def test_opsm_drops_negative_tokens_of_sequences_that_moved(batch, delta):
    ratios, advantages, masks = batch
    found = sequence_level.opsm_mask(ratios, advantages, masks, delta=delta, like=torch.zeros(0))
    wanted = [
        0.0 if a < 0 and mean_of(r, m) > delta else 1.0
        for r, adv, m in zip(ratios, advantages, masks, strict=True)
        for a in adv.tolist()
    ]
    assert found.tolist() == wanted


@given(st.lists(st.tuples(*[st.floats(-4, 4, width=32)] * 3), min_size=1, max_size=8), st.sampled_from([0.1, 0.5]))
@settings(deadline=None)
def test_the_value_loss_is_the_larger_of_both_errors(rows, clip):
    values, old, returns = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    loss, clipped = sequence_level.clipped_value_loss(values, old, returns, clip=clip)
    for i, (v, o, r) in enumerate(rows):
        held = o + max(-clip, min(clip, v - o))
        assert math.isclose(float(loss[i]), max((held - r) ** 2, (v - r) ** 2), rel_tol=1e-9, abs_tol=1e-12)
        assert float(clipped[i]) == float(abs(v - o) > clip)


def test_no_sample_gives_nothing():
    nothing = torch.zeros(0)
    assert sequence_level.gspo_kl([], [], nothing).shape == (0,)
    assert sequence_level.opsm_mask([], [], [], delta=0.0, like=nothing).shape == (0,)
