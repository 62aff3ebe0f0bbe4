"""Saving and loading of the rollout manager: going on as if nothing had happened."""

import asyncio
import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.procs import eventually
from support.rollout_cases import Answer, adds, make_args, make_config, manager, servers, sums
from support.rollout_hooks import release

from miles.rollout import manager_state
from miles.rollout.data_source import DataSource
from miles.rollout.hooks import close_hook_pool
from miles.rollout.journal import replay
from miles.rollout.saved_state import NotSavable
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.rollout_state import mark_checkpoint, pending_directory
from miles.utils.types import Sample

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


def publish(root, rollout_id):
    """What the trainer does between the two halves of a save."""
    directory = Path(root) / f"iter_{rollout_id:07d}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    mark_checkpoint(Path(root), rollout_id, directory)


async def saved(rollout, rollout_id, root):
    await rollout.save(rollout_id, str(root))
    publish(root, rollout_id)
    await rollout.commit_save(rollout_id, str(root))


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
            await saved(rollout, 2, tmp_path / "saved")
            at_save = rollout.ledger()
        with manager(config_of(tmp_path, "second")) as rollout:
            await started(rollout, fake)
            assert await rollout.load(2, str(tmp_path / "saved"))
            assert rollout.ledger() == at_save
            assert await rollout.restored_weight_version() == 2
            second = await rollouts(rollout, range(3, 6))
            assert rollout.ledger() == account
    assert first + second == whole
    assert replay(tmp_path / "second" / "journal" / "rollout.jsonl").describe() == account


async def test_nothing_there_is_told_and_changes_nothing(tmp_path):
    with servers(sometimes_right) as fake, manager(config_of(tmp_path, "run")) as rollout:
        await started(rollout, fake)
        assert not await rollout.load(5, str(tmp_path))
        assert await rollout.restored_weight_version() == 0


async def test_only_the_position_of_another_system_is_loaded(tmp_path):
    with servers(sometimes_right) as fake, manager(config_of(tmp_path, "run")) as rollout:
        await started(rollout, fake)
        await rollouts(rollout, [0])
        await saved(rollout, 0, tmp_path / "saved")
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
        await saved(rollout, 0, tmp_path / "saved")
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
        await saved(rollout, 0, tmp_path / "saved")
        files = {p.name: p.read_bytes() for p in (tmp_path / "saved" / "rollout").iterdir()}
        rollout._loaded.source.inner.buffer[0][0].metadata["client"] = object()
        with pytest.raises(NotSavable, match="client"):
            await rollout.save(0, str(tmp_path / "saved"))
        assert {p.name: p.read_bytes() for p in (tmp_path / "saved" / "rollout").iterdir()} == files


# -- crashes -------------------------------------------------------------------------------------------------


class Counting(DataSource):
    """A user's own, which writes a file of its own."""

    def __init__(self, args):
        self.args, self.given = args, 0

    def get_samples(self, num_samples):
        self.given += num_samples
        return [[Sample(prompt="1+1=")] for _ in range(num_samples)]

    def add_samples(self, samples):
        raise NotImplementedError

    def save(self, rollout_id):
        (Path(self.args.save) / f"mine_{rollout_id}.json").write_text(json.dumps(self.given))

    def load(self, rollout_id=None):
        self.given = json.loads((Path(self.args.load) / f"mine_{rollout_id}.json").read_text())


class Side:
    """The rollout side of a run that saves to ``root``; ``take`` makes its state another."""

    def __init__(self, root):
        self.root = root
        self.args = make_args(save=str(root), load=str(root), data_source_path="Counting")
        self.source = TrackedDataSource(Counting(self.args))

    def take(self, count):
        self.source.get_samples(count)

    async def save(self):
        await manager_state.save(self.args, self.source, {"weight_version": 1}, 7, self.root)

    def commit(self, steps=None):
        return list(itertools.islice(manager_state.commit_steps(7, self.root), steps))

    async def whole_save(self):
        await self.save()
        publish(self.root, 7)
        manager_state.commit(7, self.root)

    @staticmethod
    async def loaded(root):
        """Groups that the loaded state has taken, by the user's source and by the ledger; None: there is no state."""
        side = Side(root)
        if await manager_state.load(side.args, side.source, 7, root) is None:
            return None
        assert side.source.ledger.num_taken == side.source.inner.given
        return side.source.inner.given


@pytest.fixture(autouse=True)
def no_pool():
    yield
    close_hook_pool()


@pytest.fixture
async def side(tmp_path):
    """Checkpoint 7 is there with 1 group; the run went on from further back and has taken 3 more."""
    side = Side(tmp_path)
    side.take(1)
    await side.whole_save()
    side.take(3)
    assert await Side.loaded(tmp_path) == 1
    return side


async def test_until_the_trainer_publishes_the_earlier_state_of_that_name_counts(side):
    await side.save()
    assert await Side.loaded(side.root) == 1
    side.take(1)
    await side.save()  # the run was repeated, and the trainer failed again
    assert await Side.loaded(side.root) == 1


async def test_a_crash_while_the_state_is_written_leaves_the_earlier_one(side):
    await side.save()
    pending = pending_directory(side.root, 7)
    pending.rename(pending.with_name(pending.name + ".tmp"))
    assert await Side.loaded(side.root) == 1


async def test_once_the_trainer_has_published_the_new_state_counts_wherever_the_commit_stops(side):
    await side.save()
    publish(side.root, 7)
    assert await Side.loaded(side.root) == 4
    for steps in (1, 2):
        assert len(side.commit(steps)) == steps
        assert pending_directory(side.root, 7).exists()
        assert await Side.loaded(side.root) == 4
    assert len(side.commit()) == 3
    assert await Side.loaded(side.root) == 4
    assert sorted(p.name for p in side.root.rglob("*") if p.is_file()) == [
        "mine_7.json", "rollout_manager_7.msgpack", "rollout_state",
    ]  # fmt: skip


async def test_a_commit_that_stopped_is_completed_before_the_next_save(side):
    await side.save()
    publish(side.root, 7)
    side.commit(1)
    side.take(5)
    await side.save()  # without the trainer: the checkpoint is still that of 4 groups
    assert await Side.loaded(side.root) == 4
    publish(side.root, 7)
    assert await Side.loaded(side.root) == 9


async def test_without_a_checkpoint_there_is_no_state(tmp_path):
    side = Side(tmp_path)
    side.take(2)
    await side.save()
    assert await Side.loaded(tmp_path) is None
    publish(tmp_path, 7)
    assert await Side.loaded(tmp_path) == 2


async def test_the_state_of_another_checkpoint_does_not_count(side):
    (side.root / "iter_0000007" / "rollout_state").write_text("of another")
    assert await Side.loaded(side.root) is None


async def test_random_numbers_go_on_where_they_were(side):
    await side.whole_save()
    wanted = [random.random(), float(np.random.random())]
    random.seed(5)
    np.random.seed(5)
    await Side.loaded(side.root)
    assert [random.random(), float(np.random.random())] == wanted
