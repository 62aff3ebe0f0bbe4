"""Estimators against their formulas, written as loops in float64 over random responses with awkward masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.backends.training_utils.loss_hub import estimators

numbers = st.floats(-3, 3, width=32)


@st.composite
def responses(draw):
    """Rewards, values, KLs and masks of a few responses: none, one or many tokens, masks with holes or empty."""
    count = draw(st.integers(1, 4))
    lengths = [draw(st.sampled_from([0, 1, 2, 7, 127, 128, 129, 300])) for _ in range(count)]
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    made = {name: [torch.randn(n, generator=generator) for n in lengths] for name in ("values", "kls")}
    kept = [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in lengths]
    masks = [(torch.rand(n, generator=generator) < share).float() for n, share in zip(lengths, kept, strict=True)]
    return {"rewards": [draw(numbers) for _ in lengths], "masks": masks, **made}


def close(found, wanted):
    """Sums of hundreds of terms that are stored as float32."""
    assert len(found) == len(wanted)
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) for a, b in zip(found.tolist(), wanted, strict=True))


weights = st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.0])


@given(responses(), st.sampled_from([0.0, 0.1]), weights, weights)
@settings(deadline=None)
def test_gae_is_the_sum_over_trained_tokens(made, kl_coef, gamma, lambd):
    advantages, returns = estimators.gae(
        made["rewards"], made["values"], made["kls"], made["masks"], kl_coef=kl_coef, gamma=gamma, lambd=lambd
    )
    for i, mask in enumerate(made["masks"]):
        trained = [t for t, m in enumerate(mask.tolist()) if m]
        values = [float(made["values"][i][t]) for t in trained] + [0.0]
        rewards = [-kl_coef * float(made["kls"][i][t]) for t in trained]
        if rewards:
            rewards[-1] += made["rewards"][i]
        wanted_a, wanted_r, running = [0.0] * len(mask), [0.0] * len(mask), 0.0
        for k in reversed(range(len(trained))):
            running = rewards[k] + gamma * values[k + 1] - values[k] + gamma * lambd * running
            wanted_a[trained[k]], wanted_r[trained[k]] = running, running + values[k]
        assert close(advantages[i], wanted_a)
        assert close(returns[i], wanted_r)


@given(responses(), st.sampled_from([0.0, 0.2]), weights)
@settings(deadline=None)
def test_reinforce_plus_plus_discounts_over_all_tokens(made, kl_coef, gamma):
    found = estimators.reinforce_plus_plus_returns(
        made["rewards"], made["kls"], made["masks"], kl_coef=kl_coef, gamma=gamma
    )
    for i, mask in enumerate(made["masks"]):
        last = max((t for t, m in enumerate(mask.tolist()) if m), default=None)
        wanted, running = [0.0] * len(mask), 0.0
        for t in reversed(range(len(mask))):
            reward = made["rewards"][i] if t == last else 0.0
            running = reward - kl_coef * float(made["kls"][i][t]) + gamma * running
            wanted[t] = running
        assert close(found[i], wanted)


def test_the_baseline_variant_takes_the_kl_of_each_token():
    kls = [torch.tensor([0.5, -1.0]), torch.zeros(0)]
    found = estimators.reinforce_plus_plus_baseline_advantages([2.0, 7.0], kls, kl_coef=0.1)
    assert found[0].tolist() == pytest.approx([1.95, 2.1])
    assert found[1].tolist() == []


def test_without_discount_and_without_values_gae_is_the_reward_everywhere():
    zeros = [torch.zeros(5)]
    advantages, returns = estimators.gae(
        [3.0], zeros, zeros, [torch.tensor([1.0, 0, 1, 1, 0])], kl_coef=0.0, gamma=1.0, lambd=1.0
    )
    assert advantages[0].tolist() == returns[0].tolist() == [3.0, 0.0, 3.0, 3.0, 0.0]


def test_a_response_of_which_nothing_is_trained_has_no_advantage():
    advantages, returns = estimators.gae(
        [3.0], [torch.ones(2)], [torch.ones(2)], [torch.zeros(2)], kl_coef=0.1, gamma=1.0, lambd=0.9
    )
    assert advantages[0].tolist() == returns[0].tolist() == [0.0, 0.0]


def test_distillation_moves_advantages_towards_the_teacher():
    found = estimators.distilled([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, -2.0])], coef=0.5)
    assert found[0].tolist() == [0.0, 2.0]


def test_every_token_has_its_responses_reward():
    assert [a.tolist() for a in estimators.grpo_returns([1.5, -1.0], [2, 0])] == [[1.5, 1.5], []]
