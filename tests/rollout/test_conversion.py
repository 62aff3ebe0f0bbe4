"""Samples, rewards relative to their prompt, train data, metrics, recorded rollouts."""

import numpy as np
import pytest
from support.rollout_cases import adds, make_args, make_config, manager, servers, sums

from miles.rollout.debug_data import BadDebugData, load_rollout_data, save_rollout_data
from miles.rollout.generate_utils.sample_utils import merge_samples
from miles.rollout.metrics import eval_metrics, rollout_metrics
from miles.rollout.rewards import UnequalSiblings, post_process_rewards
from miles.rollout.saved_state import NotSavable
from miles.rollout.train_data import NothingToTrain, convert_samples_to_train_data, trim
from miles.utils.metric_utils import compute_pass_rate, compute_rollout_step, has_repetition
from miles.utils.processing_utils import shared_tokenizer
from miles.utils.types import BadSample, MultimodalTypes, RewardSpec, Sample


def sample(index, reward, group=0, length=3, **values):
    made = Sample(group_index=group, index=index, reward=reward, tokens=[1, *range(length)], response_length=length)
    made.rollout_log_probs = [-0.5] * length
    made.status = Sample.Status.COMPLETED
    vars(made).update(values)
    return made


# -- rewards -------------------------------------------------------------------------------------------------


async def rewards_of(samples, **values):
    return (await post_process_rewards(make_args(**values), samples))[1]


async def test_rewards_are_relative_to_the_prompts_mean_and_deviation():
    samples = [sample(i, r, group=i // 4) for i, r in enumerate([1, 0, 0, 0, 5, 5, 5, 5])]
    found = await rewards_of(samples)
    values = np.array([1, 0, 0, 0.0])
    expected = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(found[:4], expected, rtol=1e-12)
    assert found[4:] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"grpo_std_normalization": False}, [0.75, -0.25, -0.25, -0.25]),
        ({"advantage_estimator": "reinforce_plus_plus_baseline"}, [0.75, -0.25, -0.25, -0.25]),
        ({"advantage_estimator": "ppo"}, [1, 0, 0, 0]),
        ({"advantage_estimator": "reinforce_plus_plus"}, [1, 0, 0, 0]),
        ({"rewards_normalization": False}, [1, 0, 0, 0]),
    ],
)
async def test_other_estimators(values, expected):
    assert await rewards_of([sample(i, r) for i, r in enumerate([1, 0, 0, 0])], **values) == expected


async def test_samples_of_one_execution_count_once():
    samples = [sample(i, r, rollout_id=e) for i, (r, e) in enumerate([(1, 0), (1, 0), (1, 0), (0, 1)])]
    assert await rewards_of(samples, grpo_std_normalization=False) == [0.5, 0.5, 0.5, -0.5]
    samples[1].reward = 0.5
    with pytest.raises(UnequalSiblings):
        await rewards_of(samples)


async def test_without_group_numbers_blocks_are_contiguous():
    samples = [sample(i, r, group=None) for i, r in enumerate([1, 0, 2, 2])]
    args = {"n_samples_per_prompt": 2, "rollout_batch_size": 2, "grpo_std_normalization": False}
    assert await rewards_of(samples, **args) == [0.5, -0.5, 0, 0]
    assert await rewards_of(samples[:3], **args) == [0, -1, 1]


async def test_a_reward_of_one_sample_is_its_own_mean():
    assert await rewards_of([sample(0, 3.0)]) == [0.0]


@pytest.mark.parametrize("reward", ["good", [1], None, {"score": 1}])
async def test_a_reward_that_is_no_number_is_refused(reward):
    with pytest.raises(BadSample, match="is no number"):
        await rewards_of([sample(0, reward)])


# -- train data ----------------------------------------------------------------------------------------------


async def test_columns_of_train_data():
    samples = [
        sample(0, 1.0, loss_mask=[1, 0, 1], weight_versions=["3"], train_metadata={"a": 1}),
        sample(1, 0.0, remove_sample=True, weight_versions=["3", "4"], status=Sample.Status.TRUNCATED),
    ]
    data = await convert_samples_to_train_data(make_args(), samples)
    assert data["tokens"] == [[1, 0, 1, 2]] * 2
    assert data["loss_masks"] == [[1, 0, 1], [0, 0, 0]]
    assert data["rollout_mask_sums"] == [2, 0]
    assert data["truncated"] == [0, 1]
    assert data["raw_reward"] == [1.0, 0.0]
    assert data["rollout_ids"] == data["sample_indices"] == [0, 1]
    assert data["rollout_log_probs"] == [[-0.5] * 3] * 2
    assert data["weight_versions"] == [["3"], ["3", "4"]]
    assert data["metadata"] == [{"a": 1}, {}]
    samples[1].weight_versions = []  # no engine answered it
    data = await convert_samples_to_train_data(make_args(), samples)
    assert data["weight_versions"] == [["3"], []]
    assert "teacher_log_probs" not in data
    samples[0].metadata["raw_reward"], samples[1].metadata["raw_reward"] = 9, 8
    assert (await convert_samples_to_train_data(make_args(), samples))["raw_reward"] == [9, 8]


async def test_values_that_only_some_samples_have_are_refused():
    with pytest.raises(NothingToTrain, match="1 of 2 samples have no rollout_log_probs"):
        await convert_samples_to_train_data(make_args(), [sample(0, 1.0), sample(1, 1.0, rollout_log_probs=None)])


@pytest.mark.parametrize(
    "values", [{"loss_mask": [1]}, {"rollout_log_probs": []}, {"response_length": 9}, {"response_length": -1}]
)
async def test_lengths_that_do_not_fit_are_refused(values):
    with pytest.raises(BadSample, match="does not fit together"):
        await convert_samples_to_train_data(make_args(), [sample(0, 1.0, **values)])


@pytest.mark.parametrize(
    ("sizes", "step", "kept"),
    [([2, 2, 2, 2], 4, 4), ([2, 2, 2], 4, 2), ([3, 3, 2, 3], 8, 3), ([2] * 5, 2, 5)],
)
def test_whole_groups_are_trimmed(sizes, step, kept):
    indices = iter(range(100))
    groups = [[sample(next(indices), 1.0, group=g) for _ in range(size)] for g, size in enumerate(sizes)]
    assert trim(make_args(global_batch_size=step), groups) == (groups[:kept], groups[kept:])
    assert trim(make_args(global_batch_size=step, disable_rollout_trim_samples=True), groups) == (groups, [])
    partial = {"allow_partial_train_step": True, "global_batch_size": step}
    assert trim(make_args(**partial, use_dynamic_batch_size=True), groups) == (groups, [])
    assert trim(make_args(**partial, use_dynamic_batch_size=False), groups) == (groups[:kept], groups[kept:])


def test_too_few_samples_for_a_step_are_told():
    with pytest.raises(NothingToTrain, match="6 executions do not fill a step of 8"):
        trim(make_args(), [[sample(3 * g + i, 1.0, group=g) for i in range(3)] for g in range(2)])


def test_a_step_counts_executions_and_not_their_samples():
    """Groups of 2 executions, of which the first made one sample and two, the second two and one."""
    groups = [
        [sample(0, 1.0), [sample(1, 1.0), sample(1, 1.0)]],
        [[sample(2, 1.0, group=1), sample(2, 1.0, group=1)], sample(3, 1.0, group=1)],
        [sample(4, 1.0, group=2), sample(5, 1.0, group=2)],
    ]
    assert trim(make_args(global_batch_size=4), groups) == (groups[:2], groups[2:])


def test_groups_that_never_fill_steps_exactly_are_kept_until_one_is_full():
    groups = [[sample(3 * g + i, 1.0, group=g) for i in range(3)] for g in range(3)]
    assert trim(make_args(global_batch_size=4), groups) == (groups[:2], groups[2:])


async def test_what_is_trimmed_goes_back_with_its_answers(tmp_path):
    config = make_config(
        prompt_data=sums(tmp_path / "p.jsonl"), run_dir=str(tmp_path), rollout_batch_size=3, global_batch_size=4
    )
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        assert (await rollout.generate(0)).num_samples == 4
        await rollout.trained(0)
        assert rollout.ledger() == "3 taken = 2 trained + 0 filtered + 1 returned + 0 open"
        [group] = rollout._loaded.source.inner.buffer
        assert [s.reward for s in group] == [1, 1]


# -- samples -------------------------------------------------------------------------------------------------


def test_a_sample_is_as_before_from_its_dict():
    one = sample(3, {"score": 1.0}, reward_spec=RewardSpec("math"), metadata={"a": 1}, mine="extra")
    one.update_from_meta_info(
        make_args(),
        {
            "weight_version": 7, "finish_reason": {"type": "length"}, "cached_tokens": 2, "prompt_tokens": 8,
            "completion_tokens": 6, "spec_verify_ct": 3, "spec_accept_token_num": 2, "spec_draft_token_num": 4,
        },
    )  # fmt: skip
    plain = one.to_dict()
    assert plain["status"] == "truncated"
    other = Sample.from_dict(plain)
    assert other == one
    assert other.mine == "extra"
    assert other.spec_info.spec_accept_rate == 0.5
    assert other.spec_info.spec_accept_length == 2.0
    assert other.prefix_cache_info.prefix_cache_hit_rate == 0.25
    assert other.weight_versions == ["7"]


def test_tokens_can_be_taken_back():
    tokenizer = shared_tokenizer(make_args().hf_checkpoint)
    ids = tokenizer.encode("abc")
    one = Sample(tokens=[1, *ids], response_length=3, rollout_log_probs=[1, 2, 3], loss_mask=[1, 1, 1], response="abc")
    one.strip_last_output_tokens(1, tokenizer)
    assert (one.tokens, one.response, one.rollout_log_probs, one.loss_mask) == ([1, *ids[:2]], "ab", [1, 2], [1, 1])
    one.strip_last_output_tokens(9, tokenizer)
    assert (one.tokens, one.response, one.response_length) == ([1], "", 0)
    one.strip_last_output_tokens(0, tokenizer)


def test_a_sample_can_be_generated_again():
    one = sample(3, 1.0, weight_versions=["10", "9", "x"], label="l", metadata={"a": 1})
    assert one.oldest_weight_version == 9
    assert one.effective_response_length == 3
    one.reset_for_retry()
    assert one == Sample(group_index=0, index=3, label="l", metadata={"a": 1}, status=Sample.Status.ABORTED)


def test_turns_of_a_conversation_become_one_sample():
    tokenizer = shared_tokenizer(make_args().hf_checkpoint)
    one = Sample(tokens=[1, 2, 3], response_length=1, rollout_log_probs=[-1.0], weight_versions=["1"])
    two = Sample(tokens=[1, 2, 3, 8, 9, 4], response_length=1, rollout_log_probs=[-2.0], weight_versions=["2"])
    one.rollout_routed_experts = np.zeros((2, 1, 1), np.int32)
    two.rollout_routed_experts = np.arange(5, dtype=np.int32).reshape(5, 1, 1)  # of the whole request
    merged = merge_samples([one, two], tokenizer)
    assert merged.rollout_routed_experts is two.rollout_routed_experts
    assert merged.tokens == two.tokens
    assert merged.response_length == 4
    assert merged.loss_mask == [1, 0, 0, 1]
    assert merged.rollout_log_probs == [-1.0, 0.0, 0.0, -2.0]
    assert merged.weight_versions == ["1", "2"]
    merged.validate()
    with pytest.raises(BadSample, match="does not go on"):
        merge_samples([two, one], tokenizer)


def test_kinds_of_media():
    assert [kind.name for kind in MultimodalTypes.all()] == ["image", "video", "audio"]
    assert MultimodalTypes.get("video") is MultimodalTypes.VIDEO
    assert MultimodalTypes.get("smell") is None


# -- metrics -------------------------------------------------------------------------------------------------


def test_metrics_of_a_rollout():
    groups = [[sample(0, 0), sample(1, 0)], [sample(2, 1, length=5), sample(3, 0)], [sample(4, 1), sample(5, 1)]]
    groups[0][0].weight_versions, groups[0][1].weight_versions = ["1"], ["1", "3"]
    found = rollout_metrics(make_args(log_passrate=True), groups, 2.0)
    assert found["rollout/response_len/mean"] == pytest.approx(20 / 6)
    assert found["rollout/response_len/max"] == 5
    assert found["rollout/zero_std/count_0.0"] == 1
    assert found["rollout/zero_std/all_zero_percentage"] == pytest.approx(1 / 3)
    assert found["rollout/zero_std/all_one_percentage"] == pytest.approx(1 / 3)
    assert found["rollout/weight_version/mean"] == pytest.approx(5 / 3)
    assert found["rollout/mixed_version_ratio"] == pytest.approx(1 / 6)
    assert found["passrate/pass@1"] == pytest.approx(0.5)
    assert found["passrate/pass@2"] == pytest.approx(2 / 3)
    assert found["perf/tokens_per_gpu_per_sec"] == 10
    assert found["perf/longest_sample_tokens_per_sec"] == 2.5


def test_metrics_of_an_evaluation_with_missing_rewards():
    data = {"x": {"rewards": [1, None], "truncated": [True, False], "samples": []}}
    found = eval_metrics(make_args(), data)
    assert found == {"eval/x": 1.0, "eval/x-none_reward_ratio": 0.5, "eval/x-truncated_ratio": 0.5}


def test_numbers_made_of_samples():
    assert compute_pass_rate([1, 0, 0, 0], 4) == {"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0}
    assert compute_pass_rate([1, 0, 0], 2) == {}
    assert has_repetition("again and " * 1000)
    assert not has_repetition("short")
    args = make_args(wandb_always_use_train_step=True, global_batch_size=4)
    assert compute_rollout_step(args, 3) == 6
    args.global_batch_size = 5  # eight samples: five, then three
    assert compute_rollout_step(args, 3) == 6
    assert compute_rollout_step(make_args(), 3) == 3


async def test_experts_are_known_for_what_is_trained():
    rows = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    whole = sample(0, 1.0, rollout_routed_experts=rows)
    tool = sample(1, 0.0, length=5, loss_mask=[1, 1, 1, 0, 0], rollout_routed_experts=rows)
    untrained = sample(2, 0.0, remove_sample=True)
    data = await convert_samples_to_train_data(make_args(), [whole, tool, untrained])
    found = data["rollout_routed_experts"]
    assert found[2] is None and found[0] is rows
    np.testing.assert_array_equal(found[1], np.concatenate([rows, np.full((2, 2, 2), -1)]))
    for bad in ({"loss_mask": [1, 1, 1, 1, 0]}, {"loss_mask": None}):
        unknown = sample(1, 0.0, length=5, rollout_routed_experts=rows, **bad)
        with pytest.raises(BadSample, match="does not fit"):
            await convert_samples_to_train_data(make_args(), [whole, unknown])
    with pytest.raises(NothingToTrain, match="1 of 2 samples have no rollout_routed_experts"):
        await convert_samples_to_train_data(make_args(), [whole, sample(1, 0.0)])


# -- recorded rollouts ---------------------------------------------------------------------------------------


def test_recorded_samples_are_as_before(tmp_path):
    import torch

    groups = [[sample(0, 1.0), sample(1, 0.0)], [sample(2, 1.0, group=1)]]
    groups[0][0].rollout_routed_experts = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    groups[0][0].metadata = {"numpy": np.float32(2), "array": np.zeros(2)}
    path = save_rollout_data(str(tmp_path / "r_{rollout_id}.pt"), 3, groups, {})
    assert path.name == "r_3.pt"
    loaded = load_rollout_data(str(tmp_path / "r_{rollout_id}.pt"), 3)
    assert [len(group) for group in loaded] == [2, 1]
    np.testing.assert_array_equal(loaded[0][0].rollout_routed_experts, groups[0][0].rollout_routed_experts)
    assert loaded[0][0].metadata["numpy"] == 2.0
    assert loaded[0][1] == groups[0][1]
    assert len(load_rollout_data(str(path), 3, 0.5)) == 1
    assert torch.load(path, weights_only=True)["rollout_id"] == 3


def test_recorded_rollouts_that_cannot_be_used(tmp_path):
    with pytest.raises(BadDebugData, match="no rollout data for rollout 1"):
        load_rollout_data(str(tmp_path / "{rollout_id}.pt"), 1)
    (tmp_path / "1.pt").write_bytes(b"nonsense")
    with pytest.raises(BadDebugData, match="holds no rollout data"):
        load_rollout_data(str(tmp_path / "{rollout_id}.pt"), 1)
    with pytest.raises(NotSavable, match=r"samples\[0\]\['metadata'\]\['client'\] is a builtins.object"):
        save_rollout_data(str(tmp_path / "x.pt"), 0, [[sample(0, 1.0, metadata={"client": object()})]], {})


async def test_a_recorded_rollout_gives_the_same_train_data_without_engines(tmp_path):
    template = str(tmp_path / "rollout_{rollout_id}.pt")
    values = {"prompt_data": sums(tmp_path / "p.jsonl"), "run_dir": str(tmp_path)}
    with servers(adds) as fake, manager(make_config(save_debug_rollout_data=template, **values)) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        [ref] = (await rollout.generate(0)).refs
        recorded = rollout.shipped[ref]
    with manager(make_config(load_debug_rollout_data=template, **values)) as rollout:
        facts = await rollout.start([], "", "")
        assert facts["dataset_size"] is None and facts["num_rollout_per_epoch"] is None and facts["num_too_long"] == 0
        [ref] = (await rollout.generate(0)).refs
        replayed = rollout.shipped[ref]
        assert rollout._loaded.source.ledger.taken == {"foreign": 4}
        with pytest.raises(BadDebugData):
            await rollout.generate(1)
    assert recorded.keys() == replayed.keys()
    np.testing.assert_array_equal(recorded["tokens"], replayed["tokens"])
    np.testing.assert_array_equal(
        recorded["per_token"]["rollout_log_probs"], replayed["per_token"]["rollout_log_probs"]
    )
    np.testing.assert_array_equal(recorded["per_sample"]["rewards"], replayed["per_sample"]["rewards"])
