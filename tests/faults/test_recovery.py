"""Ranks of the trainer and the rollout manager, as real processes, are killed or stopped: the run goes on as if not."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from support.cluster import error_of, real_cluster
from support.procs import eventually
from support.recovery_actors import FileRollouts, TextTrainer

from miles.rollout.hooks import BadHookResult, HookFailed
from miles.training.keeper import DEATH_S
from miles.training.recovery import Recovery, Starts
from miles.training.recovery_plan import RecoveryGivenUp
from miles_controller.policy import Policy

pytestmark = pytest.mark.asyncio(loop_scope="module")
SETTINGS = {
    "load": None, "offload_train": False, "recovery_interval": 100, "trainer_heartbeat_checker_first_wait": 0,
    "trainer_heartbeat_checker_interval": 0.1, "trainer_heartbeat_checker_timeout": 20.0,
    "trainer_heartbeat_checker_failure_threshold": 3,
}  # fmt: skip
QUICK_HEARTS = {"trainer_heartbeat_checker_timeout": 1.0}
STOPPED_S = 0.5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=1) as cluster:
        yield cluster


class Run:
    """The loop's side."""

    def __init__(self, recovery, directory):
        self.recovery, self.directory = recovery, directory
        self.trainer, self.rollout = (recovery.calls(name, 60.0) for name in ("trainer", "rollout"))
        self.told = []
        recovery.say = self.told.append

    def ask(self, *names):
        """For an end, or the end of a wait."""
        for name in names:
            (self.directory / name).touch()

    async def iterate(self, rollout_id):
        refs = await self.rollout.generate.call_one(rollout_id)
        answers = await self.trainer.train.call(rollout_id, refs)
        self.recovery.trained = rollout_id
        return list(answers.values)

    async def kill(self, part, rank=0, sig=signal.SIGKILL):
        pids = (await part.pid.call()).values
        os.kill(pids[rank], sig)

    def lives(self, rank=0):
        return len((self.directory / f"lives-{rank}").read_text())


def after(*rollouts):
    """The state of a trainer that was never disturbed."""
    return ["".join(f"{n}: batch {n};" for n in rollouts)] * 2


@asynccontextmanager
async def running(cluster, directory, *, ranks=2, death_s=DEATH_S, **values):
    """A trainer, of two ranks if not said otherwise, and a rollout manager, with recovery."""
    config = {**SETTINGS, "run_dir": str(directory), **values}
    controller = cluster.controller

    async def trainer(changed):
        return await controller.spawn(
            "trainer",
            TextTrainer,
            dict(changed),
            dims={"gpus": ranks},
            policy=Policy("kill_group", stopped_timeout_s=config.get("stopped_s")),
            oversubscribe=True,
            rank_env=lambda rank: {"MILES_TEST_RANK": str(rank)},
        )

    async def init(mesh, changed):
        await mesh.options(timeout_s=60.0).init.call()

    async def rollout():
        policy = Policy(stopped_timeout_s=STOPPED_S)
        return await controller.spawn("rollout", FileRollouts, str(directory), devices_per_rank=0, policy=policy)

    async def nothing(mesh):
        pass

    meshes = {"trainer": await trainer(config), "rollout": await rollout()}
    await init(meshes["trainer"], config)
    starts = Starts(trainer=trainer, init_trainer=init, rollout=rollout, init_rollout=nothing)
    recovery = Recovery(controller, config, starts, **meshes, fleet=None, start=0, death_s=death_s)
    await recovery.begin()
    try:
        async with recovery.running():
            yield Run(recovery, directory)
    finally:
        for name in meshes:
            mesh = controller.meshes.find(name)
            if mesh is not None:
                await mesh.stop(grace_s=0.0)


@pytest.mark.parametrize("where", ["idle", "train", "update", "save"])
async def test_a_rank_that_dies_is_back_in_its_state(cluster, tmp_path, where):
    async with running(cluster, tmp_path) as run:
        for rollout_id in range(2):
            assert await run.iterate(rollout_id) == after(*range(rollout_id + 1))
        if where == "idle":
            await run.kill(run.trainer, 1)
        else:
            run.ask(f"die-1-{where}")
        if where == "update":
            assert list((await run.trainer.update_weights.call(7)).values) == [(7, after(0, 1)[0])] * 2
        if where == "save":
            await run.trainer.save.call(1, str(tmp_path / "saved"))
            assert [(tmp_path / "saved" / "iter_0000001" / str(rank)).read_text() for rank in (0, 1)] == after(0, 1)
        assert await run.iterate(2) == after(0, 1, 2)
        assert (await run.rollout.story.call_one())["replays"] == [0, 1]
        assert run.lives() == 2
        [line] = run.told
        assert "trainer's 2 ranks" in line
        assert "2 rollouts trained again" in line
        assert ("SIGKILL" if where == "idle" else "SIGABRT") in line
        [event] = [event for event in cluster.events("recovered") if event.text == line]
        assert event.fields["seconds"] > 0


@pytest.mark.parametrize(
    ("asked", "lives"),
    [
        (["lose-each-other"], 2),
        (["lose-each-other-in-a-hook"], 2),
        pytest.param(["die-1-train", "lose-each-other-in-a-hook"], 3, marks=pytest.mark.long),  # also in the replay
    ],
)
async def test_an_error_that_a_death_explains_is_none(cluster, tmp_path, asked, lives):
    async with running(cluster, tmp_path, death_s=60.0) as run:
        await run.iterate(0)
        run.ask(*asked)
        assert await run.iterate(1) == after(0, 1)
        assert "SIGABRT" in run.told[0]
        assert run.lives() == lives


async def test_a_stopped_rank_is_found_by_its_heartbeats(cluster, tmp_path):
    async with running(cluster, tmp_path, **QUICK_HEARTS) as run:
        await run.iterate(0)
        run.ask("wait-1")
        training = asyncio.ensure_future(run.iterate(1))
        await eventually((tmp_path / "batches" / "1").exists)
        await run.kill(run.trainer, 1, signal.SIGSTOP)
        (tmp_path / "wait-1").unlink()
        assert await training == after(0, 1)
        assert "rank 1 left out 3 heartbeats in a row" in run.told[0]


async def test_ranks_that_hang_while_their_group_comes_back_are_found_and_count(cluster, tmp_path):
    async with running(cluster, tmp_path, **QUICK_HEARTS) as run:
        await run.iterate(0)
        mesh = run.recovery.mesh("trainer")
        await run.kill(run.trainer, 1)
        await mesh.wait_failed()
        run.ask("stop-1-init", "stuck-0-train")
        assert await run.iterate(1) == after(0, 1)
        assert not list(tmp_path.glob("st*-*"))
        assert (await run.rollout.story.call_one())["replayed"] == [0, 0]  # of both attempts the data leaves the store
        [line] = run.told
        assert "SIGKILL" in line
        run.ask("die-0-train")
        error = await error_of(run.iterate(2), RecoveryGivenUp)
        assert [f"rank {rank} left out 3 heartbeats" in error.evidence for rank in (0, 1)] == [True, True]


async def test_what_is_replayed_outlives_a_rollout_manager(cluster, tmp_path):
    async with running(cluster, tmp_path) as run:
        await run.iterate(0)
        run.ask("wait-1")
        await run.kill(run.trainer, 1)
        await eventually((tmp_path / "waiting-1").exists, 30.0)  # in the replay
        await run.kill(run.rollout)
        await cluster.event("recovered", "the rollout manager", fits=lambda event: event.text in run.told)
        (tmp_path / "wait-1").unlink()
        assert await run.iterate(1) == after(0, 1)
        story = await run.rollout.story.call_one()
        assert (story["replaying"], story["replayed"]) == ([{0: ["batch 0"]}], [0])


async def test_the_newest_checkpoint_is_where_it_begins(cluster, tmp_path):
    async with running(cluster, tmp_path, recovery_interval=2) as run:
        wrote = []
        for rollout_id in range(3):
            await run.iterate(rollout_id)
            wrote.append(await run.recovery.after(rollout_id))
        assert wrote == [False, True, False]
        assert (await run.rollout.kept.call_one())[0] == [2]
        run.ask("die-0-train")
        assert await run.iterate(3) == after(0, 1, 2, 3)
        assert (await run.rollout.story.call_one())["replays"] == [2]
        assert "the checkpoint of rollout 1, 1 rollout trained again" in run.told[0]
        own = tmp_path / "recovery" / "checkpoints"
        assert await run.recovery.after(3)
        assert [path.name for path in own.iterdir()] == ["iter_0000003"]


async def test_the_rollout_manager_goes_on_where_it_was(cluster, tmp_path):
    async with running(cluster, tmp_path) as run:
        await run.iterate(0)
        run.ask("die-generate")
        assert await run.iterate(1) == after(0, 1)
        assert (await run.rollout.story.call_one())["recovered_at"] == [(0, 0)]
        assert "the rollout manager" in run.told[0]
        await run.kill(run.rollout)
        run.ask("die-0-train", "die-replay")
        assert await run.iterate(2) == after(0, 1, 2)
        assert (await run.rollout.story.call_one())["recovered_at"] == [(1, 0)]
        assert len(run.told) == 4


@pytest.mark.parametrize(
    ("part", "sig"),
    [
        ("trainer", signal.SIGSTOP),
        ("rollout", signal.SIGSTOP),
        pytest.param("rollout", signal.SIGKILL, marks=pytest.mark.long),
    ],
)
async def test_what_ends_or_stops_is_started_again_whatever_is_done(cluster, tmp_path, part, sig):
    async with running(cluster, tmp_path, stopped_s=STOPPED_S) as run:
        await run.iterate(0)
        doing = [
            ("generate", lambda: run.iterate(1), after(0, 1)),
            ("1", lambda: run.iterate(2), after(0, 1, 2)),
            ("update", lambda: run.trainer.update_weights.call(7), [(7, after(0, 1, 2)[0])] * 2),
        ]
        for number, (what, begin, expected) in enumerate(doing):
            run.ask(f"wait-{what}")
            task = asyncio.ensure_future(begin())
            await eventually((tmp_path / f"waiting-{what}").exists, 30.0)
            await run.kill(getattr(run, part), 1 if part == "trainer" else 0, sig)
            if part == "trainer":  # else its successor waits, too
                (tmp_path / f"wait-{what}").unlink()
            await eventually(lambda number=number: len(run.told) > number, 60.0)
            (tmp_path / f"wait-{what}").unlink(missing_ok=True)
            found = await task
            assert list(getattr(found, "values", found)) == expected
            assert ("the rollout manager" if part == "rollout" else "the trainer's 2 ranks") in run.told[number]
            assert ("was stopped (SIGSTOP) for" in run.told[number]) == (sig == signal.SIGSTOP)
        assert run.lives() == (1 if part == "rollout" else 4)


async def test_deaths_in_a_recovery_count_and_the_budget_ends_it(cluster, tmp_path):
    async with running(cluster, tmp_path) as run:
        await run.iterate(0)
        run.ask("die-1-init", "die-1-train")
        assert await run.iterate(1) == after(0, 1)
        run.ask("always-init", "die-0-train")
        error = await error_of(run.iterate(2), RecoveryGivenUp)
        assert "3 restarts within 600 s are used up" in error.what
        assert error.evidence.count("SIGABRT") == 4
        assert (await run.recovery.given_up()) is error


@pytest.mark.parametrize(
    ("kind", "ranks", "death_s"), [(HookFailed, 2, 0.1), (HookFailed, 1, 3600.0), (BadHookResult, 2, 3600.0)]
)
async def test_user_code_that_raises_is_not_asked_again(cluster, tmp_path, kind, ranks, death_s):
    """And no death is waited for where none can explain it."""
    async with running(cluster, tmp_path, ranks=ranks, death_s=death_s) as run:
        await run.iterate(0)
        run.ask(f"raise-{ranks - 1}-{kind.__name__}")
        error = await error_of(run.iterate(1), kind)
        assert "the user's traceback" in error.evidence
        assert run.lives() == 1
        assert not run.told


async def test_where_memory_changes_hands_ranks_begin_when_they_are_used(cluster, tmp_path):
    async with running(cluster, tmp_path, offload_train=True) as run:
        await run.iterate(0)
        mesh = cluster.controller.meshes.find("trainer")
        await run.kill(run.trainer, 1)
        await mesh.wait_failed()
        for rollout_id in (1, 2):
            await run.rollout.generate.call_one(rollout_id)
        assert run.lives() == 1
        assert await run.iterate(1) == after(0, 1)
        assert run.lives() == 2
