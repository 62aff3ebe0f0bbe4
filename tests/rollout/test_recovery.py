"""A rollout manager that dies and the one after it are as one that lived: nothing is lost, nothing is trained twice."""

import asyncio
import itertools
import json
import random
import shutil
import tempfile
import threading
from argparse import Namespace
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rollout_cases import Answer, LocalManager, adds, make_config, manager, servers, sums

from miles.rollout import manager_state
from miles.rollout.batch_journal import Batch, BatchJournal
from miles.rollout.data_source import DataSource
from miles.rollout.hooks import close_hook_pool
from miles.rollout.journal import Journal, replay
from miles.rollout.messages import RolloutBatchRefs
from miles.rollout.recovery import NoStateKept, RolloutRecovery
from miles.rollout.saved_state import read_values
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.types import Sample

FILTER = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
NUM_ROLLOUTS = 5
REFS = itertools.count()
STATES = 12
CRASHES = ("none", "taken", "batch", "state", "trained")


class Numbers(DataSource):
    """One number after the other; what comes back is given out first. Its position is in a file of its own."""

    def __init__(self, args):
        self.args, self.next, self.buffer = args, 0, []

    def get_samples(self, num_samples):
        found = [self.buffer.pop(0) for _ in range(min(num_samples, len(self.buffer)))]
        while len(found) < num_samples:
            found.append([Sample(group_index=self.next, index=self.next, prompt=str(self.next))])
            self.next += 1
        return found

    def add_samples(self, samples):
        self.buffer += samples

    def save(self, rollout_id):
        state = {"next": self.next, "buffer": [group[0].group_index for group in self.buffer]}
        (Path(self.args.save) / f"numbers_{rollout_id}.json").write_text(json.dumps(state))

    def load(self, rollout_id=None):
        state = json.loads((Path(self.args.load) / f"numbers_{rollout_id}.json").read_text())
        self.next = state["next"]
        self.buffer = [[Sample(group_index=n, index=n, prompt=str(n))] for n in state["buffer"]]


class Job:
    """The loop's side of a run whose rollout manager may die anywhere: what it trains on, and what it tells."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.trained = -1
        self.trained_groups: list[int] = []
        self.begin()

    def begin(self):
        """A process."""
        self.source = TrackedDataSource(Numbers(Namespace(save=None, load=None)))
        self.source.attach(Journal(self.directory / "journal.jsonl"))
        args = self.source.inner.args
        args.data_source_path = "test.Numbers"
        self.recovery = RolloutRecovery(args, self.source, self.directory / "recovery")

    async def die(self):
        """And its successor."""
        self.source.journal.close()
        self.begin()
        await self.recovery.restore(self.trained)

    async def generate(self, rollout_id, turn):
        """A rollout's groups, in the way of ``turn``; whatever dies is asked again."""
        while True:
            if (made := await self.recovery.again(rollout_id)) is not None:
                return made.parts[0]["groups"].tolist()
            self.source.begin(rollout_id)
            groups = self.source.get_samples(turn["taken"])
            kept = groups[: turn["kept"]]
            numbers = [group[0].group_index for group in kept]
            crash, turn = turn["crash"], {**turn, "crash": "none"}
            if crash == "taken":
                await self.die()
                continue
            self.source.give_back(groups[turn["kept"] + turn["filtered"] :], "surplus")
            self.source.filtered(groups[turn["kept"] :][: turn["filtered"]], "filtered")
            self.source.select(kept)
            batch = Batch(RolloutBatchRefs([], {}, len(kept)), [{"groups": np.array(numbers)}])
            if crash == "batch":
                self.recovery.batches.write(rollout_id, batch)
                await self.die()
                continue
            await self.recovery.shipped({}, rollout_id, batch)
            if crash == "state":
                await self.die()
                continue
            return numbers

    async def train(self, rollout_id, groups, crash):
        """A rollout that was generated."""
        self.trained_groups += groups
        self.trained = rollout_id
        if crash == "trained":
            await self.die()
        self.source.trained(rollout_id)


TURN = st.integers(1, 4).flatmap(
    lambda kept: st.fixed_dictionaries(
        {
            "kept": st.just(kept),
            "filtered": st.integers(0, 2),
            "taken": st.integers(kept + 2, kept + 5),
            "crash": st.sampled_from(CRASHES),
        }
    )
)


async def live(directory, turns, ahead):
    """A run; with ``ahead`` the next rollout is generated before this one is trained on."""
    job = Job(directory)
    await job.recovery.begin({}, -1)
    waiting = []
    for rollout_id, turn in enumerate(turns):
        waiting.append((rollout_id, await job.generate(rollout_id, turn), turn["crash"]))
        while len(waiting) > ahead:
            await job.train(*waiting.pop(0))
    for late in waiting:
        await job.train(*late)
    await job.die()
    return job


@settings(max_examples=25, deadline=None)
@given(st.lists(TURN, min_size=NUM_ROLLOUTS, max_size=NUM_ROLLOUTS), st.integers(0, 1))
def test_every_group_is_trained_on_once_or_filtered_or_still_there(turns, ahead):
    with tempfile.TemporaryDirectory() as directory:
        job = asyncio.run(live(directory, turns, ahead))
        close_hook_pool()
        assert len(job.trained_groups) == sum(turn["kept"] for turn in turns)
        assert len(set(job.trained_groups)) == len(job.trained_groups)
        ledger = job.source.ledger
        assert not ledger.open
        assert ledger.num_trained == len(job.trained_groups)
        assert ledger.num_filtered == sum(turn["filtered"] for turn in turns)
        waiting = [group[0].group_index for group in (*job.source.inner.buffer, *job.source.overflow)]
        assert set(waiting) == ledger.returned
        assert len(set(waiting)) == len(waiting)
        assert not set(waiting) & set(job.trained_groups)
        gone = set(range(job.source.inner.next)) - set(waiting) - set(job.trained_groups)
        assert len(gone) == ledger.num_filtered
        job.source.journal.close()
        assert replay(Path(directory) / "journal.jsonl").to_plain() == ledger.to_plain()


async def test_a_state_that_was_removed_is_told(tmp_path):
    job = Job(tmp_path)
    await job.recovery.begin({}, -1)
    job.trained = 0
    with pytest.raises(NoStateKept, match="brought back") as raised:
        await job.die()
    assert "rollout 0 was trained on" in raised.value.evidence
    shutil.rmtree(tmp_path / "recovery")
    with pytest.raises(NoStateKept):
        await job.recovery.restore(-1)
    job.source.journal.close()
    close_hook_pool()


def test_what_is_saved_of_both_sides_is_of_one_moment():
    source = TrackedDataSource(Numbers(Namespace()))
    seen, moving = [], threading.Event()

    def move():
        while not moving.is_set():
            source.give_back(source.get_samples(3), "again")

    movers = [threading.Thread(target=move) for _ in range(2)]
    for mover in movers:
        mover.start()
    for _ in range(200):
        position = {}

        def save(position=position):
            position["there"] = [group[0].group_index for group in source.inner.buffer]

        _, groups = source.cut(save, source.checkpoint)
        seen.append([*position["there"], *(group[0].group_index for group in groups)])
    moving.set()
    for mover in movers:
        mover.join(timeout=30)
    # Each group is on one side: none on both, none on neither.
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in seen)


class Drawing(Numbers):
    """Draws from the generators of the process with each call, as a data source that shuffles may; its position is how
    often it did."""

    drawn = 0

    def get_samples(self, num_samples):
        random.random()
        np.random.random()
        self.drawn += 1
        return super().get_samples(num_samples)

    def save(self, rollout_id):
        (Path(self.args.save) / str(rollout_id)).write_text(str(self.drawn))


async def test_the_generators_that_are_saved_are_those_of_the_position(tmp_path):
    source = TrackedDataSource(Drawing(Namespace(save=None, load=None, data_source_path="test.Drawing")))
    args, over = source.inner.args, threading.Event()
    random.seed(1)
    np.random.seed(1)

    def move():
        while not over.is_set():
            source.give_back(source.get_samples(1), "again")

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for number in range(STATES):
            await manager_state.write_state(args, source, {}, number, tmp_path / str(number))
    finally:
        over.set()
        mover.join(timeout=30)
        close_hook_pool()
    position = 0
    random.seed(1)
    np.random.seed(1)
    for number in range(STATES):
        before, position = position, int((tmp_path / str(number) / str(number)).read_text())
        for _ in range(position - before):
            random.random()
            np.random.random()
        head = next(read_values(manager_state.state_path(tmp_path / str(number), number)))
        assert head["random"] == manager_state._random_states()
    assert position > 0


class SameStore(LocalManager):
    """What is in the store outlives the process that put it there; removing twice does nothing."""

    def __init__(self, config, there):
        super().__init__(config)
        self.shipped = there

    async def _put(self, parts):
        refs = [next(REFS) for _ in parts]
        self.shipped.update(zip(refs, parts, strict=True))
        return refs

    async def _remove(self, ref):
        self.shipped.pop(ref, None)

    async def _remove_left(self, kept):
        """As of this life nothing is in the store yet."""
        for ref in set(self.shipped) - set(kept):
            del self.shipped[ref]


def config_of(tmp_path):
    return make_config(
        prompt_data=sums(tmp_path / "p.jsonl", 10), run_dir=str(tmp_path / "run"), over_sampling_batch_size=6,
        dynamic_sampling_filter_path=FILTER, sglang_enable_deterministic_inference=True, rollout_shuffle=True,
        sglang_server_concurrency=1,
    )  # fmt: skip


def sometimes_right(payload, prompt):
    """By the request's place in its group, so that it is the same each time."""
    right = payload["sampling_params"]["sampling_seed"] % 2
    return adds(payload, prompt) if right and not prompt.startswith("3") else Answer("\\boxed{-1}")


async def rollout_of(rollout, number):
    """Its train data."""
    batch = await rollout.generate(number)
    [part] = [rollout.shipped[ref] for ref in batch.refs]
    return part["tokens"].tolist(), part["per_sample"]["sample_indices"].tolist(), batch.metrics["rollout/raw_reward"]


async def test_a_manager_after_a_manager_gives_the_same_rollouts(tmp_path):
    config, found, there = config_of(tmp_path), [], {}
    with servers(sometimes_right) as fake:
        with manager(config | {"run_dir": str(tmp_path / "whole")}) as rollout:
            await rollout.start(fake.targets, fake.router.url, "secret")
            whole = [await rollout_of(rollout, number) for number in range(4)]
        for life in range(4):
            rollout = SameStore(config, there)
            try:
                await rollout.start(fake.targets, fake.router.url, "secret")
                await (rollout.keep(-1) if life == 0 else rollout.recover(life - 2, 7, 0, {}))
                if life > 0:  # the answer of the one before it was lost
                    shipped = set(there)
                    assert await rollout_of(rollout, life - 1) == found[-1]
                    assert set(there) == shipped
                    await rollout.trained(life - 1)
                    assert not there
                    assert rollout.weight_version == 7
                found.append(await rollout_of(rollout, life))
            finally:
                rollout.close()
        assert found == whole
        assert BatchJournal(tmp_path / "run" / "recovery" / "batches").rollouts() == [0, 1, 2, 3]


@asynccontextmanager
async def life(config, there, fake):
    """Of a manager that dies without a word."""
    rollout = SameStore(config, there)
    try:
        await rollout.start(fake.targets, fake.router.url, "secret")
        yield rollout
    finally:
        rollout.close()


async def test_what_a_manager_put_into_the_store_and_told_nobody_of_is_removed_by_the_next(tmp_path):
    config, there = config_of(tmp_path), {}
    with servers(sometimes_right) as fake:
        async with life(config, there, fake) as rollout:
            await rollout.keep(-1)
            rollout._recovery.shipped = dies_with(rollout._recovery.shipped)
            with pytest.raises(Ended):
                await rollout.generate(0)
            assert there
        async with life(config, there, fake) as rollout:
            await rollout.recover(-1, 0, 0, {})
            assert not there
            first = (await rollout.generate(0)).refs
            await rollout.trained(0)
            replayed = await rollout.replay(0)
            assert await rollout.replay(0) != replayed  # for other ranks: the first have died
            replayed = list(there)
            second = (await rollout.generate(1)).refs
            await rollout._put([{}])  # of a replay whose answer was lost
        async with life(config, there, fake) as rollout:
            await rollout.recover(0, 7, 0, {0: replayed})
            assert sorted(there) == sorted([*replayed, *second])
            await rollout.replayed(0)
            assert list(there) == second != first


class Ended(Exception):
    """In place of the end of the process."""


def dies_with(shipped):
    """The state is never written."""

    async def dying(*args):
        raise Ended

    return dying


async def test_a_kept_batch_is_given_again_until_a_checkpoint_has_it(tmp_path):
    with servers(sometimes_right) as fake, manager(config_of(tmp_path)) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        await rollout.keep(-1)
        tokens, indices, _ = await rollout_of(rollout, 0)
        await rollout.trained(0)
        assert not rollout.shipped
        rollouts, num_bytes = await rollout.kept()
        assert rollouts == [0]
        assert num_bytes > 0
        [ref] = await rollout.replay(0)
        assert rollout.shipped[ref]["tokens"].tolist() == tokens
        assert rollout.shipped[ref]["per_sample"]["sample_indices"].tolist() == indices
        await rollout.replayed(0)
        assert not rollout.shipped
        await rollout.covered(0)
        assert await rollout.kept() == ([], 0)
