"""Advantages by estimator flag: what columns they are made of, and what is refused. The formulas are tested beside."""

from types import SimpleNamespace

import pytest
import torch

from miles.backends.base import ParallelState
from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.loss_hub import estimators
from miles.backends.training_utils.loss_hub.advantages import MissingColumn, compute_advantages_and_returns
from miles.backends.training_utils.loss_hub.math_utils import compute_approx_kl

LENGTHS = [3, 1, 4]
REWARDS = [1.0, -0.5, 2.0]
COLUMNS = ("log_probs", "rollout_log_probs", "ref_log_probs", "teacher_log_probs", "values")


def rank_data(*, without=()):
    generator = torch.Generator().manual_seed(0)
    columns = {n: [torch.randn(k, generator=generator) for k in LENGTHS] for n in COLUMNS if n not in without}
    masks = [torch.tensor([1.0, 0.0, 1.0]), torch.ones(1), torch.tensor([1.0, 1.0, 1.0, 0.0])]
    return RankData(
        tokens=[torch.zeros(k + 2, dtype=torch.int32) for k in LENGTHS],
        response_lengths=list(LENGTHS),
        loss_masks=masks,
        columns={"rewards": list(REWARDS), **columns},
        shared={},
        partition=[0, 1, 2],
        steps=[],
        forward=[],
    )


ONE_RANK = ParallelState()


def advantages(estimator, data, *, parallel=ONE_RANK, **changed):
    compute_advantages_and_returns(SimpleNamespace(advantage_estimator=estimator, **changed), parallel, data)
    return data.columns.get("advantages"), data.columns.get("returns")


def same(found, wanted):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_group_relative_estimators_take_the_reward(estimator):
    found, returns = advantages(estimator, rank_data(without=COLUMNS))
    assert same(found, estimators.grpo_returns(REWARDS, LENGTHS))
    assert same(found, returns)


@pytest.mark.parametrize(("changed", "old"), [({}, "log_probs"), ({"use_rollout_logprobs": True}, "rollout_log_probs")])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "low_var_kl"])
def test_the_kl_of_rewards_is_against_the_policy_that_generated(changed, old, kl):
    data = rank_data()
    kls = [compute_approx_kl(p, q, kl) for p, q in zip(data.columns[old], data.columns["ref_log_probs"], strict=True)]
    wanted = estimators.reinforce_plus_plus_returns(REWARDS, kls, data.loss_masks, kl_coef=0.3, gamma=0.9)
    found, _ = advantages("reinforce_plus_plus", data, kl_coef=0.3, kl_loss_type=kl, gamma=0.9, **changed)
    assert same(found, wanted)
    wanted = estimators.reinforce_plus_plus_baseline_advantages(REWARDS, kls, kl_coef=0.3)
    found, _ = advantages("reinforce_plus_plus_baseline", rank_data(), kl_coef=0.3, kl_loss_type=kl, **changed)
    assert same(found, wanted)


def test_ppo_takes_the_critics_values():
    data = rank_data()
    zeros = [torch.zeros(k) for k in LENGTHS]
    wanted = estimators.gae(REWARDS, data.columns["values"], zeros, data.loss_masks, kl_coef=0.0, gamma=0.9, lambd=0.8)
    found = advantages("ppo", data, gamma=0.9, lambd=0.8)
    assert same(found[0], wanted[0])
    assert same(found[1], wanted[1])


@pytest.mark.parametrize("how", [{"estimator": "grpo", "use_opd": True}, {"estimator": "on_policy_distillation"}])
def test_distillation_comes_on_top_or_alone(how):
    data, changed = rank_data(), dict(how)
    estimator = changed.pop("estimator")
    teacher = zip(data.columns["log_probs"], data.columns["teacher_log_probs"], strict=True)
    reverse = [p - q for p, q in teacher]
    base = estimators.grpo_returns(REWARDS if estimator == "grpo" else [0.0] * 3, LENGTHS)
    found, _ = advantages(estimator, data, opd_kl_coef=0.5, **changed)
    assert same(found, [a - 0.5 * kl for a, kl in zip(base, reverse, strict=True)])
    assert same(data.columns["opd_reverse_kl"], reverse)


def test_a_reverse_kl_that_the_rollout_computed_wins():
    data = rank_data(without=("teacher_log_probs",))
    data.columns["opd_reverse_kl"] = [[0.5] * k for k in LENGTHS]
    found, _ = advantages("on_policy_distillation", data)
    assert same(found, [torch.full((k,), -0.5) for k in LENGTHS])


@pytest.mark.parametrize(
    ("estimator", "changed", "missing"),
    [
        ("ppo", {}, "values"),
        ("reinforce_plus_plus", {"kl_coef": 0.1}, "ref_log_probs"),
        ("reinforce_plus_plus_baseline", {"kl_coef": 0.1}, "log_probs"),
        ("on_policy_distillation", {}, "teacher_log_probs"),
    ],
)
def test_a_missing_column_is_named(estimator, changed, missing):
    with pytest.raises(MissingColumn) as caught:
        advantages(estimator, rank_data(without=(missing,)), **changed)
    assert f"there is no column {missing}" in str(caught.value.evidence)


def test_a_teacher_with_other_lengths_is_refused():
    data = rank_data()
    data.columns["teacher_log_probs"][1] = torch.zeros(9)
    with pytest.raises(MissingColumn, match="another length"):
        advantages("on_policy_distillation", data)


def test_ranks_without_logits_have_no_advantages():
    assert advantages("ppo", rank_data(without=COLUMNS), parallel=ParallelState(pp_size=2)) == (None, None)
