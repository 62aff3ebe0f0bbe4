"""When weights are handed to engines while a rollout is waited for, and what the rollout manager is told before."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from miles.training.stopwatch import Stopwatch
from miles.training.weight_updates import WeightUpdates

CONFIG = {"offload_train": False, "offload_rollout": False, "check_weight_update_equal": False}


class Job:
    """Fleet, rollout manager and the recovery of both: they write down what they are asked, in order."""

    def __init__(self, *, may_become):
        self.asked, self.answer = [], may_become
        self.targets, self.weight_version = [], 4
        self.recovery = SimpleNamespace(next_version=0)
        self.parts = SimpleNamespace(fleet=self, weight_version=0, recovery=self.recovery)
        rollout = SimpleNamespace(
            may_become=SimpleNamespace(call_one=self.may_become),
            set_weight_version=SimpleNamespace(call_one=self.set_weight_version),
        )
        console = SimpleNamespace(say=self.asked.append, phase=nullcontext)
        self.updates = WeightUpdates(self.parts, CONFIG, console, trainer=SimpleNamespace(), rollout=rollout)
        self.updates.is_due = True

    async def may_become(self, version):
        self.asked.append(("may become", version, self.recovery.next_version))
        return self.answer

    async def weight_update(self, send, *, version):
        self.asked.append(("update", version, self.recovery.next_version))
        self.weight_version = version
        return version

    async def set_weight_version(self, version):
        self.asked.append(("are", version, self.recovery.next_version))


async def test_an_update_at_once_is_announced_to_the_rollout_manager_and_to_its_successors():
    job = Job(may_become=True)
    assert await job.updates.update_at_once()
    assert job.asked == [("may become", 5, 5), ("update", 5, 5), ("are", 5, 5)]
    assert job.recovery.next_version == 0
    assert job.updates.can_catch_up()


async def test_nothing_changes_if_a_rollout_is_on_its_way():
    job = Job(may_become=False)
    assert not await job.updates.update_at_once()
    assert job.asked == [("may become", 5, 5)]
    assert (job.weight_version, job.recovery.next_version) == (4, 0)
    assert not job.updates.can_catch_up()


@pytest.mark.parametrize("lacks", ["fleet", "trainer"])
async def test_without_engines_or_trainer_there_is_nothing_to_hand_over(lacks):
    job = Job(may_become=True)
    setattr(job.parts if lacks == "fleet" else job.updates, lacks, None)
    assert not await job.updates.update_at_once()
    assert job.asked == []


async def test_an_update_in_its_turn_asks_nobody():
    job = Job(may_become=False)
    await job.updates.update(Stopwatch())
    assert [what for what, *_ in job.asked] == ["update", "are"]
