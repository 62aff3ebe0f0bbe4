"""Saving and loading of the rollout manager: going on as if nothing had happened."""

import asyncio

import pytest
from support.procs import eventually
from support.rollout_cases import Answer, adds, make_config, manager, servers, sums
from support.rollout_hooks import release

from miles.rollout.journal import replay
from miles.rollout.saved_state import NotSavable

FILTER = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


def sometimes_right(payload, prompt):
    """By the request's place in its group, so that it is the same each time."""
    right = payload["sampling_params"]["sampling_seed"] % 2
    return adds(payload, prompt) if right and not prompt.startswith("3") else Answer("\\boxed{-1}")


def config_of(tmp_path, name, **values):
    """With surplus in each rollout, and groups that are filtered."""
    (tmp_path / name).mkdir(exist_ok=True)
    return make_config(
        prompt_data=sums(tmp_path / "p.jsonl", 10), run_dir=str(tmp_path / name), over_sampling_batch_size=6,
        dynamic_sampling_filter_path=FILTER, sglang_enable_deterministic_inference=True, rollout_shuffle=True,
        sglang_server_concurrency=1, save=str(tmp_path / name), **values,
    )  # fmt: skip


async def rollouts(rollout, numbers):
    """Train data of these rollouts, without what depends on the order of answers."""
    found = []
    for number in numbers:
        await rollout.set_weight_version(number)
        batch = await rollout.generate(number)
        [part] = [rollout.shipped[ref] for ref in batch.refs]
        found.append((part["tokens"].tolist(), part["per_sample"]["sample_indices"].tolist()))
        await rollout.trained(number)
    return found


async def started(rollout, fake):
    await rollout.start(fake.targets, fake.router.url, "secret")


async def test_three_rollouts_and_three_after_loading_are_six(tmp_path):
    with servers(sometimes_right) as fake:
        with manager(config_of(tmp_path, "whole")) as rollout:
            await started(rollout, fake)
            whole = await rollouts(rollout, range(6))
            account = rollout.ledger()
        with manager(config_of(tmp_path, "first")) as rollout:
            await started(rollout, fake)
            first = await rollouts(rollout, range(3))
            await rollout.save(2, str(tmp_path / "saved"))
            at_save = rollout.ledger()
        with manager(config_of(tmp_path, "second")) as rollout:
            await started(rollout, fake)
            assert await rollout.load(2, str(tmp_path / "saved"))
            assert rollout.ledger() == at_save
            second = await rollouts(rollout, range(3, 6))
            assert rollout.ledger() == account
    assert first + second == whole
    assert replay(tmp_path / "second" / "journal" / "rollout.jsonl").describe() == account


async def test_nothing_there_is_told_and_changes_nothing(tmp_path):
    with servers(sometimes_right) as fake, manager(config_of(tmp_path, "run")) as rollout:
        await started(rollout, fake)
        assert not await rollout.load(5, str(tmp_path))


async def test_only_the_position_of_another_system_is_loaded(tmp_path):
    with servers(sometimes_right) as fake, manager(config_of(tmp_path, "run")) as rollout:
        await started(rollout, fake)
        await rollouts(rollout, [0])
        await rollout.save(0, str(tmp_path / "saved"))
        position = rollout._loaded.source.inner.sample_group_index
        (tmp_path / "saved" / "rollout" / "rollout_manager_0.msgpack").unlink()
        (tmp_path / "saved" / "rollout" / "rollout_buffer_0.msgpack").unlink()
        rollout._loaded.source.inner.sample_group_index = 0
        assert await rollout.load(0, str(tmp_path / "saved"))
        assert rollout._loaded.source.inner.sample_group_index == position


async def test_groups_under_way_are_in_a_checkpoint_without_what_was_made_of_them(tmp_path):
    release.clear()
    values = {"custom_rm_path": "support.rollout_hooks.slow_sync_rm", "dynamic_sampling_filter_path": None}
    config = config_of(tmp_path, "run") | values | {"over_sampling_batch_size": 4}
    with servers(lambda p, t: Answer(hangs_after=2)) as fake, manager(config) as rollout:
        await started(rollout, fake)
        task = asyncio.ensure_future(rollout.generate(0))
        await eventually(lambda: fake.requests)
        await rollout.save(0, str(tmp_path / "saved"))
        assert rollout.ledger().endswith("4 open")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        assert await rollout.load(0, str(tmp_path / "saved"))
        assert rollout.ledger() == "4 taken = 0 trained + 0 filtered + 4 returned + 0 open"
        [(_, indices)] = await rollouts(rollout, [1])
        assert indices == list(range(8))
        assert rollout._loaded.source.ledger.taken == {"fresh": 4, "buffer": 4}


async def test_what_cannot_be_saved_is_told_and_the_old_state_stays(tmp_path):
    with servers(sometimes_right) as fake, manager(config_of(tmp_path, "run")) as rollout:
        await started(rollout, fake)
        await rollouts(rollout, [0])
        await rollout.save(0, str(tmp_path / "saved"))
        files = {p.name: p.read_bytes() for p in (tmp_path / "saved" / "rollout").iterdir()}
        rollout._loaded.source.inner.buffer[0][0].metadata["client"] = object()
        with pytest.raises(NotSavable, match="client"):
            await rollout.save(0, str(tmp_path / "saved"))
        assert {p.name: p.read_bytes() for p in (tmp_path / "saved" / "rollout").iterdir()} == files
