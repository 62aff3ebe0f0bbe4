"""Whatever user code of rollouts does, the run says what happened or goes on: in this process, and in a real one."""

import asyncio
import logging
import os
from pathlib import Path

import pytest
from support.cluster import real_cluster
from support.procs import eventually
from support.rollout_cases import KEY, adds, make_config, manager, servers, sums

from miles.flags.entry import resolve_argv
from miles.rollout.hooks import BadHookResult, HookFailed
from miles.rollout.inference_rollout.compatibility import load_generate_function
from miles.utils.http_utils import close_http_client
from miles.utils.misc import CannotLoad, ImportFailed, load_function

HOOKS = "support.rollout_hooks."


@pytest.fixture(autouse=True)
def clean():
    yield
    close_http_client()


def config_of(tmp_path, **values):
    return make_config(prompt_data=sums(tmp_path / "p.jsonl", 16), run_dir=str(tmp_path), save=str(tmp_path), **values)


async def whole_run(config):
    """Generate, evaluate, save."""
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, KEY)
        await rollout.generate(0)
        await rollout.evaluate(0)
        await rollout.save(0, config["save"])


EXITS = [
    ("rollout_function_path", "leaves"),
    ("rollout_function_path", "LeavesAtOnce"),
    ("rollout_function_path", "LeavesWhenCalled"),
    ("eval_function_path", "leaves"),
    ("custom_generate_function_path", "leaves"),
    ("custom_rm_path", "leaves"),
    ("custom_rm_path", "leaving_rm"),
    ("dynamic_sampling_filter_path", "leaves"),
    ("rollout_sample_filter_path", "leaves"),
    ("rollout_all_samples_process_path", "leaves"),
    ("custom_reward_post_process_path", "leaves"),
    ("custom_convert_samples_to_train_data_path", "leaves"),
    ("custom_rollout_log_function_path", "leaves"),
    ("custom_eval_rollout_log_function_path", "leaves"),
    ("data_source_path", "LeavesAtOnce"),
    ("data_source_path", "LeavesWhenAsked"),
    ("data_source_path", "LeavesWhenSaved"),
]


@pytest.mark.parametrize(("dest", "name"), EXITS, ids=[f"{dest}-{name}" for dest, name in EXITS])
async def test_code_that_wants_to_end_the_process_ends_the_rollout_and_is_named(tmp_path, dest, name):
    config = config_of(tmp_path, eval_prompt_data=["e", sums(tmp_path / "e.jsonl", 1)]) | {dest: HOOKS + name}
    with pytest.raises(HookFailed) as caught:
        await whole_run(config)
    assert caught.value.what.startswith("--" + dest.replace("_", "-"))
    assert "raised SystemExit: 3" in caught.value.what
    assert "rollout_hooks.py" in caught.value.evidence.splitlines()[1]


async def test_a_data_source_that_leaves_when_groups_come_back(tmp_path):
    config = config_of(tmp_path, data_source_path=HOOKS + "LeavesWhenGiven", over_sampling_batch_size=8)
    with pytest.raises(HookFailed, match=r"LeavesWhenGiven raised SystemExit"):
        await whole_run(config)


async def test_a_buffer_filter_that_leaves(tmp_path):
    config = config_of(tmp_path, buffer_filter_path=HOOKS + "leaves", over_sampling_batch_size=8)
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, KEY)
        await rollout.generate(0)
        with pytest.raises(HookFailed, match=r"--buffer-filter-path .* raised SystemExit: 3"):
            await rollout.generate(1)
        assert rollout.ledger().endswith(" 4 open")  # of rollout 0, which nobody has trained


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"data_source_path": HOOKS + "GivesNoGroups"}, BadHookResult, "a list of groups, each a list of Sample"),
        ({"data_source_path": HOOKS + "leaves"}, HookFailed, "SystemExit"),
        ({"data_source_path": HOOKS + "log_nothing"}, HookFailed, "missing 4 required positional arguments"),
        ({"rollout_function_path": HOOKS + "NotCallable"}, CannotLoad, "has no __call__"),
        ({"custom_rm_path": HOOKS + "large_rm"}, HookFailed, "raised MemoryError"),
    ],
)
async def test_what_cannot_work_is_told_by_name(tmp_path, values, error, told):
    with pytest.raises(error, match=told):
        await whole_run(config_of(tmp_path, **values))


def test_a_module_that_leaves_on_import(tmp_path, monkeypatch):
    (tmp_path / "leaves_rm.py").write_text("import sys\n\nsys.exit('not today')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportFailed, match="importing leaves_rm raised SystemExit: not today"):
        load_function("leaves_rm.f", flag="--custom-rm-path")


async def test_changes_of_args_stay_and_are_told_once_each(tmp_path, caplog):
    config = config_of(tmp_path, custom_rm_path=HOOKS + "changing_rm")
    with servers(adds) as fake, manager(config) as rollout, caplog.at_level(logging.WARNING):
        await rollout.start(fake.targets, fake.router.url, KEY)
        await rollout.generate(0)
        assert rollout.args.rollout_temperature == 0.25
    told = [r.message for r in caplog.records if "is changed by code" in r.message]
    assert sorted(told) == [f"args.{n} is changed by code; the change stays in this process"
                            for n in ("mine", "rollout_temperature")]  # fmt: skip
    assert config["rollout_temperature"] == 1.0


def test_the_number_of_parameters_and_the_name_of_the_first_tell_the_generation():
    """Three or more parameters, of which the first is not called input: the older one."""
    kinds = {name: type(load_generate_function(HOOKS + name).function).__name__ for name in
             ("new_generate", "new_by_name", "legacy_generate", "legacy_generate_with_evaluation")}  # fmt: skip
    assert kinds == {
        "new_generate": "function", "new_by_name": "function", "legacy_generate": "LegacyGenerateFnAdapter",
        "legacy_generate_with_evaluation": "LegacyGenerateFnAdapter",
    }  # fmt: skip


@pytest.mark.full
async def test_a_real_process_answers_while_user_code_blocks_and_leaves_nothing_behind(tmp_path):
    """It blocks its loop; then it prints, and leaves a thread and a process behind; then it ends its process."""
    file = tmp_path / "said"
    go_on = tmp_path / "said.go"
    values = {"user_file": str(file)}
    blocking = config_of(tmp_path, custom_rm_path=HOOKS + "slow_to_wake_rm", **values)
    naughty = blocking | {"custom_rm_path": HOOKS + "naughty_rm", "rollout_batch_size": 1, "n_samples_per_prompt": 1}
    killing = blocking | {"custom_rm_path": HOOKS + "killing_rm"}
    with servers(adds) as fake:
        async with real_cluster(tmp_path / "run") as cluster:
            spawn = cluster.controller.spawn

            async def managed(name, config):
                rollout = await spawn(name, "miles.rollout.manager:RolloutManager", config, devices_per_rank=0)
                await rollout.start.call_one(fake.targets, fake.router.url, KEY)
                return rollout

            rollout = await managed("blocking", blocking)
            call = asyncio.ensure_future(rollout.generate.call_one(0))
            await eventually(file.exists)
            async with asyncio.timeout(20.0):  # it blocks for longer, unless it is released
                assert (await rollout.progress.call_one())["phase"] == "generate"
                assert (await rollout.ledger.call_one()).startswith("4 taken")
            assert not call.done()
            go_on.touch()
            assert (await call).num_samples == 8
            await rollout.stop()

            rollout = await managed("naughty", naughty | {"global_batch_size": 1})
            await rollout.generate.call_one(0)
            left = int(file.read_text())
            os.kill(left, 0)
            async with asyncio.timeout(20):
                await rollout.stop()
            await eventually(lambda: not Path(f"/proc/{left}").exists())
            logs = "".join(path.read_text() for path in (tmp_path / "run").rglob("*naughty*") if path.is_file())
            assert "the user's own line" in logs

            rollout = await managed("killing", killing)
            with pytest.raises(Exception, match="exit code 7") as caught:
                await rollout.generate.call_one(0)
            assert "about to leave" in str(caught.value)


@pytest.mark.parametrize("dest", ["custom_generate_function_path", "rollout_function_path"])
async def test_flags_that_user_code_adds_reach_it(tmp_path, dest):
    """By the command line, and with their default; and its own reward reads them."""
    flag = "--" + dest.replace("_", "-")
    for typed, weight in ((["--user-weight", "0.75"], 0.75), ([], 0.5)):
        resolved = resolve_argv([flag, HOOKS + "FlaggedGenerate", *typed])
        assert resolved.config["user_weight"] == weight
        assert not any("user-weight" in problem.flag for problem in resolved.problems)
    config = config_of(tmp_path, custom_rm_path=HOOKS + "reads_flag", user_weight=0.75)
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, KEY)
        [ref] = (await rollout.generate(0)).refs
        assert set(rollout.shipped[ref]["per_sample"]["raw_reward"]) == {0.75}
