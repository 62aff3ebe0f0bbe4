"""Numbers made of samples, against brute force and by hand; and every name is documented."""

import itertools
from argparse import Namespace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.metric_names import undocumented

from miles.rollout.metrics import MAX_CATEGORIES, eval_metrics, rollout_metrics, sample_metrics, turns
from miles.utils.metric_utils import compute_pass_rate, numbers_of
from miles.utils.tracking_utils import log, take_logged
from miles.utils.types import Sample, SampleStatus


def args(**changes):
    values = {
        "log_passrate": True, "log_multi_turn": True, "log_correct_samples": True, "log_reward_category": None,
        "n_samples_per_prompt": 2, "n_samples_per_eval_prompt": 2, "reward_key": None, "rollout_num_gpus": 2,
        "rollout_max_response_len": 6,
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def sample(reward=0.0, length=4, mask=None, **more):
    return Sample(response_length=length, loss_mask=mask, reward=reward, status=SampleStatus.COMPLETED, **more)


# -- pass@k --------------------------------------------------------------------------------------------------------


def by_counting(rewards, k):
    """The share of choices of k samples with a correct one among them."""
    choices = list(itertools.combinations(rewards, k))
    return Fraction(sum(1 in choice for choice in choices), len(choices))


def groups_of(size):
    group = st.lists(st.sampled_from([0, 0.5, 1]), min_size=size, max_size=size)
    return st.lists(group, min_size=1, max_size=4)


@given(st.integers(1, 9).flatmap(groups_of))
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(groups):
    n = len(groups[0])
    rates = compute_pass_rate([reward for group in groups for reward in group], n)
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    assert list(rates) == [f"pass@{k}" for k in ks]
    for k in ks:
        expected = sum(by_counting(group, k) for group in groups) / len(groups)
        assert rates[f"pass@{k}"] == pytest.approx(float(expected), abs=1e-12)


def test_incomplete_groups_have_no_pass_rate():
    assert compute_pass_rate([1, 0, 1], 2) == {}
    assert compute_pass_rate([], 2) == {}
    assert compute_pass_rate([1], 0) == {}


# -- turns, correct samples, categories ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (sample(mask=[1, 1, 0, 0, 1]), 2),
        (sample(mask=[0, 1, 0, 1, 0, 1]), 3),
        (sample(mask=[0, 0]), 0),
        (sample(mask=[]), 0),
        (sample(), 1),
        (sample(length=0), 0),
        (sample(mask=[1, 0, 1], metadata={"round_number": 7}), 7),
        (sample(mask=[1, 0, 1], metadata={"round_number": "x"}), 2),
    ],
)
def test_turns(one, expected):
    assert turns(one) == expected


def test_conversations():
    group = [sample(length=6, mask=[1, 1, 0, 0, 1, 1]), sample(length=2)]
    metrics = rollout_metrics(args(), [group], 1.0)
    assert {name: value for name, value in metrics.items() if name.startswith("multi_turn/")} == {
        "multi_turn/raw_response_length/response_length_mean": 4.0,
        "multi_turn/raw_response_length/response_length_max": 6.0,
        "multi_turn/raw_response_length/response_length_min": 2.0,
        "multi_turn/raw_response_length/response_length_clip_ratio": 0.5,
        "multi_turn/wo_obs_response_length/response_length_mean": 3.0,
        "multi_turn/wo_obs_response_length/response_length_max": 4.0,
        "multi_turn/wo_obs_response_length/response_length_min": 2.0,
        "multi_turn/multi_turn_metric/round_number_mean": 1.5,
        "multi_turn/multi_turn_metric/round_number_max": 2.0,
        "multi_turn/multi_turn_metric/round_number_min": 1.0,
    }


def test_correct_samples():
    groups = [[sample(1.0, 6), sample(0.5, 2)], [sample(1, 2), sample(0.0, 1)]]
    groups[1][0].status = SampleStatus.TRUNCATED
    metrics = rollout_metrics(args(), groups, 1.0)
    found = {n.removeprefix("rollout/correct_samples/"): v for n, v in metrics.items() if "correct_samples" in n}
    assert found == {
        "count": 2.0, "ratio": 0.5, "truncated_ratio": 0.5, "response_len/mean": 4.0, "response_len/median": 4.0,
        "response_len/max": 6.0, "response_len/min": 2.0,
    }  # fmt: skip
    none = rollout_metrics(args(), [[sample(0.0), sample(0.0)]], 1.0)
    assert [n for n in none if "correct_samples" in n] == [
        "rollout/correct_samples/count",
        "rollout/correct_samples/ratio",
    ]


def test_nothing_of_it_without_the_flags():
    names = rollout_metrics(
        args(log_passrate=False, log_multi_turn=False, log_correct_samples=False), [[sample(), sample()]], 1.0
    )
    assert not [name for name in names if "multi_turn" in name or "correct" in name or "passrate" in name]


def test_categories_are_shares_and_have_an_end():
    samples = [sample({"why": "a"}), sample({"why": "a"}), sample({"why": None}), sample(1.0)]
    found = sample_metrics(args(log_reward_category="why"), samples)
    assert {n: v for n, v in found.items() if "error_cat" in n} == {"error_cat/a": 0.5, "error_cat/None": 0.25}
    many = [sample({"why": f"{n}" * 200}) for n in range(MAX_CATEGORIES + 7)]
    found = sample_metrics(args(log_reward_category="why"), many)
    shares = {n: v for n, v in found.items() if "error_cat" in n}
    assert len(shares) == MAX_CATEGORIES + 1
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(map(len, shares)) < 100


# -- metrics of user code ------------------------------------------------------------------------------------------


def test_user_code_logs_numbers_of_any_kind():
    log(None, {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": True, "d": "1", "e": [1], "rollout/step": 3})
    log(None, {"a": 0.25, "f": None, "g": np.zeros(1)}, step_key="rollout/step")
    assert take_logged() == {"a": 0.25, "b": 2.0, "c": 1.0}
    assert take_logged() == {}


def test_what_is_no_number_is_left_out():
    assert numbers_of({"a": 1, 2: 0.5, "c": float("inf"), "d": 1 + 2j, "e": np.array([1.0, 2.0])}) == {
        "a": 1.0, "2": 0.5, "c": float("inf"),
    }  # fmt: skip


# -- the page ------------------------------------------------------------------------------------------------------


def test_every_name_that_samples_give_is_documented():
    one = sample(1.0, 4, [1, 0, 1, 1], non_generation_time=1.0, weight_versions=["1", "2"])
    one.prefix_cache_info.total_prompt_tokens, one.spec_info.spec_draft_token_num, one.spec_info.spec_verify_ct = (
        4,
        4,
        2,
    )
    asked = args(log_reward_category="why", reward_key="score")
    groups = [[sample({"why": "a", "score": 1.0}), sample({"why": "b", "score": 1.0})], [one, one]]
    groups[1] = [Sample.from_dict({**one.to_dict(), "reward": {"why": "c", "score": s}}) for s in (0.0, 1.0)]
    names = [*rollout_metrics(asked, groups, 1.0), *eval_metrics(args(), {"a": {
        "rewards": [1.0, 0.0], "truncated": [True, False], "samples": groups[1],
    }})]  # fmt: skip
    assert len(names) > 50
    assert undocumented(names) == []
    wrong = ["rollout/no_such_thing", "train/no_such_thing", "eval/a/no_such_thing"]
    assert undocumented([*wrong, "eval/a/response_len/max"]) == wrong
