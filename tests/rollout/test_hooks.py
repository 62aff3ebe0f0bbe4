"""User code in all its forms: where it runs, what becomes of its results and of its errors."""

import asyncio
import json

import pytest
from support import rollout_hooks
from support.procs import eventually
from support.rollout_cases import adds, make_args, make_config, manager, servers, sums

from miles.rollout.debug_data import load_rollout_data
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.hooks import BadHookResult, HookFailed
from miles.rollout.journal import replay
from miles.rollout.rm_hub import NoReward, async_rm, batched_async_rm, deterministic_random
from miles.utils.http_utils import close_http_client
from miles.utils.misc import CannotLoad, ImportFailed, function_registry, load_function
from miles.utils.train_data import BadTrainData
from miles.utils.types import BadSample, RewardSpec, Sample

HOOKS = "support.rollout_hooks."


@pytest.fixture(autouse=True)
def clean():
    rollout_hooks.threads.clear()
    rollout_hooks.release.clear()
    yield
    rollout_hooks.release.set()
    close_http_client()


def config_of(tmp_path, **values):
    return make_config(prompt_data=sums(tmp_path / "p.jsonl", 16), run_dir=str(tmp_path), **values)


async def generated(rollout, fake=None):
    await (rollout.start(fake.targets, fake.router.url, "secret") if fake else rollout.start([], "", ""))
    batch = await rollout.generate(0)
    [part] = [rollout.shipped[ref] for ref in batch.refs]
    return batch, part


async def part_with(tmp_path, **values):
    with servers(adds) as fake, manager(config_of(tmp_path, **values)) as rollout:
        return await generated(rollout, fake)


@pytest.mark.parametrize(("name", "reward", "thread"), [("async_rm", 0.25, "user-code"), ("sync_rm", 0.5, "hook_")])
async def test_reward_functions_run_apart_from_the_endpoints(tmp_path, name, reward, thread):
    _, part = await part_with(tmp_path, custom_rm_path=HOOKS + name)
    assert set(part["per_sample"]["raw_reward"]) == {reward}
    assert rollout_hooks.threads[name].startswith(thread)


@pytest.mark.parametrize(
    "name", ["new_generate", "ClassGenerate", "legacy_generate", "legacy_generate_with_evaluation", "sync_generate"]
)
async def test_generate_functions_of_all_forms(tmp_path, name):
    _, part = await part_with(tmp_path, custom_generate_function_path=HOOKS + name)
    right = 0 if name == "sync_generate" else 1
    assert set(part["per_sample"]["raw_reward"]) == {right}
    if name == "sync_generate":
        assert rollout_hooks.threads[name].startswith("hook_")


@pytest.mark.parametrize(
    ("name", "thread"),
    [("ClassRollout", "user-code"), ("SyncClassRollout", "hook_"), ("function_rollout", "hook_")],
)
async def test_rollout_functions_of_all_forms(tmp_path, name, thread):
    with manager(config_of(tmp_path, rollout_function_path=HOOKS + name)) as rollout:
        batch, part = await generated(rollout)
        assert part["tokens"].tolist() == [5, 6, 7] * 8
        assert rollout_hooks.threads[name].startswith(thread)
        assert batch.metrics.get("mine", 3) == 3
        assert rollout.ledger() == "4 taken = 0 trained + 0 filtered + 0 returned + 4 open"


async def test_the_function_generation_of_our_rollout(tmp_path):
    path = "miles.rollout.sglang_rollout.generate_rollout"
    with servers(adds) as fake, manager(config_of(tmp_path, rollout_function_path=path)) as rollout:
        _, part = await generated(rollout, fake)
        assert set(part["per_sample"]["raw_reward"]) == {1}


async def test_what_a_rollout_function_takes_and_does_not_return_is_filtered_with_a_reason(tmp_path):
    with manager(config_of(tmp_path, rollout_function_path=HOOKS + "wasteful_rollout")) as rollout:
        await generated(rollout)
        assert rollout.ledger() == "8 taken = 0 trained + 4 filtered + 0 returned + 4 open"


async def test_an_evaluation_by_the_users_function(tmp_path):
    with manager(config_of(tmp_path, rollout_function_path=HOOKS + "function_rollout")) as rollout:
        await rollout.start([], "", "")
        assert (await rollout.evaluate(0)).metrics["eval/mine"] == 0.5


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"custom_generate_function_path": HOOKS + "bad_generate"}, BadHookResult, "returned a str"),
        ({"rollout_function_path": HOOKS + "bad_rollout"}, BadHookResult, "a list of lists of Sample"),
        ({"custom_rm_path": HOOKS + "short_group_rm", "group_rm": True}, BadHookResult, "a list of 2 rewards"),
        ({"custom_rm_path": HOOKS + "none_rm"}, BadSample, "has no reward"),
        ({"custom_rm_path": HOOKS + "dict_rm"}, BadSample, "give --reward-key"),
        ({"custom_rm_path": HOOKS + "dict_rm", "reward_key": "scores"}, BadSample, "no entry 'scores'"),
        ({"dynamic_sampling_filter_path": HOOKS + "failing_filter"}, HookFailed, "no filter today"),
        ({"custom_rm_path": HOOKS + "leaving_rm"}, HookFailed, "raised SystemExit: 3"),
        ({"custom_rm_path": HOOKS + "cancelled_rm"}, BadHookResult, "was cancelled by code in it"),
        ({"rm_type": "maths"}, NoReward, "Did you mean math"),
        ({"rm_type": None}, NoReward, "neither --rm-type nor --custom-rm-path"),
    ],
)
async def test_results_that_cannot_be_used_are_refused_by_name(tmp_path, values, error, told):
    with pytest.raises(error, match=told):
        await part_with(tmp_path, **values)


async def test_an_error_in_user_code_shows_the_users_traceback_first(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path, custom_rm_path=HOOKS + "failing_rm")) as rollout:
        with pytest.raises(HookFailed) as caught:
            await generated(rollout, fake)
        assert rollout.ledger() == "4 taken = 0 trained + 0 filtered + 4 returned + 0 open"
    lines = str(caught.value).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "rollout_hooks.py" in lines[1]
    assert "in failing_rm" in lines[1]
    assert 'KeyError: "the user\'s own mistake"' in lines
    assert "--custom-rm-path support.rollout_hooks.failing_rm raised KeyError" in str(caught.value)
    assert not any("miles/rollout" in line for line in lines)
    assert caught.value.code == "E-HOOK-002"


@pytest.mark.parametrize("name", ["blocking_rm", "busy_rm"])
async def test_whatever_user_code_does_progress_and_cancellation_go_on(tmp_path, name, caplog):
    with servers(adds) as fake, manager(config_of(tmp_path, custom_rm_path=HOOKS + name)) as rollout:
        rollout.watchdog._warn_s = 0.1
        await rollout.start(fake.targets, fake.router.url, "secret")
        task = asyncio.ensure_future(rollout.generate(0))
        await eventually(lambda: rollout.progress()["blocked_s"] > 0.1)
        await eventually(lambda: f"in {name}" in caplog.text)
        assert rollout.progress()["phase"] == "generate"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20.0):  # the user code itself blocks for longer, unless it is released
                await task
        rollout_hooks.release.set()
        await eventually(lambda: rollout.ledger().endswith("0 open"))


async def test_a_task_that_wants_to_end_the_process_ends_alone(tmp_path, caplog):
    _, part = await part_with(tmp_path, custom_rm_path=HOOKS + "careless_rm")
    assert set(part["per_sample"]["raw_reward"]) == {1.0}
    assert "wanted to end the process" in caplog.text


async def test_groups_are_rewarded_together(tmp_path):
    _, part = await part_with(tmp_path, custom_rm_path=HOOKS + "group_rm", group_rm=True)
    assert part["per_sample"]["raw_reward"].tolist() == [0, 1] * 4


async def test_one_of_a_dict_of_rewards_is_chosen(tmp_path):
    _, part = await part_with(tmp_path, custom_rm_path=HOOKS + "dict_rm", reward_key="score")
    assert set(part["per_sample"]["raw_reward"]) == {1.0}


async def test_the_users_filter_keeps_by_truth_value(tmp_path):
    batch, part = await part_with(tmp_path, dynamic_sampling_filter_path=HOOKS + "keep_even")
    assert {i // 2 % 2 for i in part["per_sample"]["sample_indices"]} == {0}
    assert batch.metrics["rollout/dynamic_filter/drop_filtered"] >= 3


async def test_hooks_on_the_collected_samples(tmp_path):
    batch, part = await part_with(
        tmp_path, rollout_sample_filter_path=HOOKS + "remove_first",
        rollout_all_samples_process_path=HOOKS + "see_all_samples",
        custom_reward_post_process_path=HOOKS + "ten_times",
        custom_rollout_log_function_path=HOOKS + "log_nothing",
    )  # fmt: skip
    assert not part["loss_masks"][: part["response_lengths"][0]].any()
    assert part["loss_masks"][part["response_lengths"][0] :].all()
    assert len(rollout_hooks.all_samples_seen) == 4
    assert set(part["per_sample"]["rewards"]) == {10.0}
    assert batch.metrics == {}


async def test_a_conversion_of_the_user(tmp_path):
    _, part = await part_with(tmp_path, custom_convert_samples_to_train_data_path=HOOKS + "own_conversion")
    assert set(part["per_sample"]["rewards"]) == {7.0}


async def test_an_execution_may_make_several_samples(tmp_path):
    batch, part = await part_with(tmp_path, custom_generate_function_path=HOOKS + "two_samples")
    assert batch.num_samples == 16
    assert sorted(set(part["per_sample"]["rollout_ids"])) == list(range(8))
    assert set(part["per_sample"]["rollout_mask_sums"]) == {4}


NO_FULL_STEP = [
    # Executions of the groups: 2, 3, 3, 2. Of the third group one is left over, of the fourth both are.
    ("custom_generate_function_path", "own_executions", 7, 3, "2 trained + 1 filtered + 1 returned", [3]),
    # A row for each group, the last is left over.
    ("custom_convert_samples_to_train_data_path", "half_conversion", 3, 1, "3 trained + 0 filtered + 1 returned", [3]),
]


@pytest.mark.parametrize(("flag", "function", "step", "left", "ends", "back"), NO_FULL_STEP)
async def test_what_fills_no_optimizer_step_does_not_end_as_trained(tmp_path, flag, function, step, left, ends, back):
    config = config_of(tmp_path, global_batch_size=step, disable_rollout_trim_samples=True) | {flag: HOOKS + function}
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        batch = await rollout.generate(0)
        [part] = [rollout.shipped[ref] for ref in batch.refs]
        assert batch.num_samples == len(part["partition"]) == step
        assert batch.metrics["rollout/dropped_samples"] == left
        await rollout.trained(0)
        assert rollout.ledger() == f"4 taken = {ends} + 0 open"
        source = rollout._loaded.source
        assert source.ledger.given_back == {"no_full_step": 1}
        assert set(source.ledger.reasons) <= {"partly_trained"}
        assert [flat(group)[0].group_index for group in source.inner.buffer] == back
    assert replay(tmp_path / "journal" / "rollout.jsonl").describe() == f"4 taken = {ends} + 0 open"


async def test_a_conversion_whose_leftover_belongs_to_nobody_is_refused(tmp_path):
    config = config_of(tmp_path, global_batch_size=3, disable_rollout_trim_samples=True)
    config["custom_convert_samples_to_train_data_path"] = HOOKS + "half_conversion_without_indices"
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        with pytest.raises(BadTrainData, match="cannot be traced"):
            await rollout.generate(0)
        assert rollout.ledger() == "4 taken = 0 trained + 0 filtered + 4 returned + 0 open"


async def test_executions_with_two_samples_fill_the_steps_that_they_count_for(tmp_path):
    batch, part = await part_with(tmp_path, custom_generate_function_path=HOOKS + "doubled")
    assert batch.num_samples == 12
    assert sorted(set(part["per_sample"]["rollout_ids"])) == list(range(8))
    assert [step["num_rollouts"] for step in part["steps"]] == [8]


async def test_a_step_of_dynamic_size_counts_executions(tmp_path):
    _, part = await part_with(
        tmp_path, custom_generate_function_path=HOOKS + "doubled", use_dynamic_global_batch_size=True
    )
    assert [step["num_rollouts"] for step in part["steps"]] == [8]


async def test_a_data_source_of_the_user_that_gives_no_numbers(tmp_path):
    config = config_of(tmp_path, data_source_path=HOOKS + "OwnSource", over_sampling_batch_size=6)
    with servers(adds) as fake, manager(config) as rollout:
        facts = await rollout.start(fake.targets, fake.router.url, "secret")
        assert facts["dataset_size"] is None
        await rollout.generate(0)
        await rollout.trained(0)
        await rollout.generate(1)
        source = rollout._loaded.source
        assert source.given < 12  # what came back is given out first, though the source keeps no buffer
        assert rollout.ledger().startswith(f"{source.ledger.num_taken} taken = 4 trained")


async def test_what_a_buffer_filter_throws_away_is_in_the_ledger(tmp_path):
    path = HOOKS + "drop_all_but_one"
    config = config_of(tmp_path, buffer_filter_path=path, over_sampling_batch_size=8)
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        await rollout.generate(0)
        await rollout.generate(1)
        ledger = rollout._loaded.source.ledger
        assert ledger.reasons == {"buffer_filter": 3}
        assert ledger.num_taken == ledger.num_filtered + ledger.num_returned + len(ledger.open)


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"custom_rm_path": "nodots"}, CannotLoad, "has no dot"),
        ({"custom_rm_path": "no_such_package.rm.f"}, CannotLoad, "there is no module no_such_package"),
        ({"custom_rm_path": HOOKS + "asinc_rm"}, CannotLoad, "has no asinc_rm; it has .*async_rm"),
        ({"rollout_function_path": "support.nothing.f"}, CannotLoad, "there is no module support.nothing"),
        ({"data_source_path": HOOKS + "FailingSource"}, HookFailed, "my database is down"),
        ({"buffer_filter_path": HOOKS + "nothing"}, CannotLoad, "--buffer-filter-path"),
    ],
)
async def test_a_wrong_path_is_told_at_the_start(tmp_path, values, error, told):
    with manager(config_of(tmp_path, **values)) as rollout, pytest.raises(error, match=told):
        await rollout.start([], "", "")


def test_a_module_that_raises_on_import_shows_its_own_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_rm.py").write_text("import json\n\n\nvalue = json.loads('{')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportFailed) as caught:
        load_function("broken_rm.f", flag="--custom-rm-path")
    assert "--custom-rm-path broken_rm.f: importing broken_rm raised JSONDecodeError" in str(caught.value)
    assert 'broken_rm.py", line 4' in caught.value.evidence.splitlines()[0]


def test_a_module_that_lacks_a_module_of_its_own_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportFailed, match="No module named 'not_installed_at_all'"):
        load_function("needs_more.f")


def test_what_is_not_built_yet_is_called_that(tmp_path, monkeypatch):
    for path in ("session.v2.picker_hub.drop_retries", "checkpoint_eval.CheckpointEvalFn"):
        with pytest.raises(CannotLoad, match="not built yet"):
            load_function(f"miles.rollout.{path}", flag="--eval-function-path")
    (tmp_path / "distilled_rm.py").write_text("import miles.rollout.checkpoint_eval\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportFailed, match="not built yet: evaluation of checkpoints"):
        load_function("distilled_rm.f")


async def test_registered_names_stand_for_functions():
    async def mine(args, sample, **kwargs):
        return 3.0

    with function_registry.temporary("mine", mine):
        assert await async_rm(make_args(custom_rm_path="mine"), Sample()) == 3.0
    assert function_registry.get("mine") is None


async def test_a_samples_own_reward_comes_first():
    sample = Sample(response="\\boxed{3}", label="3", metadata={"rm_type": "random"})
    sample.reward_spec = RewardSpec(rm_type="math")
    assert await async_rm(make_args(rm_type=None), sample) == 1
    sample.reward_spec = RewardSpec(custom_rm_path=HOOKS + "async_rm")
    assert await async_rm(make_args(rm_type="math"), sample) == 0.25
    sample.reward_spec, sample.metadata = None, {"rm_type": "boxed_deterministic_random"}
    assert await async_rm(make_args(rm_type="math"), sample) == deterministic_random(sample, "3")


async def test_rewards_of_several_samples_go_into_them_on_request():
    samples = [Sample(response="\\boxed{3}", label="3"), Sample(response="\\boxed{4}", label="3")]
    assert await batched_async_rm(make_args(), samples, inplace_set_reward_field=True) is None
    assert [s.reward for s in samples] == [1, 0]
    first = await batched_async_rm(make_args(rm_type="deterministic_random"), samples)
    assert first == await batched_async_rm(make_args(rm_type="deterministic_random"), samples)


async def test_a_samples_own_generate_function_comes_first(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path)) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        rollout._loaded.source.inner.dataset.samples[1].generate_function_path = HOOKS + "sync_generate"
        [ref] = (await rollout.generate(0)).refs
        part = rollout.shipped[ref]
    rewards = dict(zip(part["per_sample"]["sample_indices"], part["per_sample"]["raw_reward"], strict=True))
    assert [rewards[i] for i in range(8)] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert len(fake.requests) == 6


async def test_each_evaluated_data_set_has_its_own_settings(tmp_path):
    sets = [
        {"name": "plain", "path": sums(tmp_path / "a.jsonl", 2), "temperature": 0.25, "max_response_len": 9},
        {"name": "own", "path": sums(tmp_path / "b.jsonl", 1), "n_samples_per_eval_prompt": 3,
         "custom_generate_function_path": HOOKS + "sync_generate", "rm_type": "deterministic_random",
         "metadata_overrides": {"level": 2}},
    ]  # fmt: skip
    (tmp_path / "e.yaml").write_text(json.dumps({"eval": {"datasets": sets, "defaults": {"stop": ["#"]}}}))
    config = config_of(
        tmp_path, eval_config=str(tmp_path / "e.yaml"), save_debug_rollout_data=f"{tmp_path}/{{rollout_id}}.pt"
    )
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        result = await rollout.evaluate(3)
    asked = [request["sampling_params"] for request in fake.requests]
    assert [(p["temperature"], p["max_new_tokens"], p["stop"]) for p in asked] == [(0.25, 9, ["#"])] * 2
    assert result.metrics["eval/plain"] == 1
    own = [s for group in load_rollout_data(f"{tmp_path}/eval_{{rollout_id}}.pt", 3) for s in group
           if s.metadata.get("level") == 2]  # fmt: skip
    assert [s.reward for s in own] == [deterministic_random(own[0], own[0].response)] * 3
