"""A cluster whose workers die or fall silent: what callers, owners and policies see of it. Virtual time."""

import asyncio
import itertools

import pytest
from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import EXECUTED, Probe

from miles_agents.rpc.errors import StaleHandle, WorkerDied
from miles_agents.simulation import Fate
from miles_controller import Policy
from miles_controller.owned_mesh import MeshFailed

EIGHT = {"hosts": 2, "gpus": 4}


@pytest.fixture(autouse=True)
def nothing_executed():
    EXECUTED.clear()


# -- deaths of workers -----------------------------------------------------------------------------------------


def test_a_killed_worker_fails_the_calls_on_it_within_milliseconds_and_no_others():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            caller = await cluster.controller.spawn("caller", Probe)
            doomed = mesh.slice(hosts=1, gpus=2).wait.call_one(50.0)
            group = mesh.wait.call(50.0)
            from_worker = caller.endpoint("wait_for").call_one(mesh.slice(hosts=1, gpus=2), 50.0)
            others = mesh.slice(hosts=0).wait.call(3.0)
            await asyncio.sleep(1.0)
            killed_at = cluster.now
            cluster.worker(mesh, 6).kill_9()
            for call in (doomed, group, from_worker):
                error = await outcome(call)
                assert isinstance(error, WorkerDied), error
                assert "m[6] on node-1" in error.what
                assert "SIGKILL" in error.what
            assert cluster.now - killed_at < 0.005
            assert len(await others) == 4
            assert isinstance(await outcome(mesh.slice(hosts=1, gpus=2).greet.call_one("x")), WorkerDied)

    simulate(story)


@pytest.mark.parametrize("age_s", [100.0, 129.999, 130.5, 1000.0])
def test_the_death_of_a_worker_is_told_however_old_it_is(age_s):
    """The order that started it had a deadline of 130 s; neither its report nor its successor may inherit that."""

    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy(on_death="restart", backoff_s=0.1)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy, start_timeout_s=120.0)
            for _ in range(2):
                await asyncio.sleep(age_s)
                killed_at = cluster.now
                cluster.told.clear()
                cluster.worker(mesh, 0).kill_9()
                died_at, _ = await cluster.event("worker_died")
                assert died_at - killed_at < 0.005
                back_at, _ = await cluster.event("worker_restarted")
                assert back_at - killed_at < 1.0

    simulate(story)


def test_policy_fail_tells_the_owner_and_leaves_the_others_alone():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            cluster.worker(mesh, 6).kill_9()
            await cluster.event("mesh_failed")
            assert isinstance(mesh.failure, MeshFailed)
            assert "rank 6" in str(mesh.failure)
            assert len(cluster.living) == 7
            assert len(await mesh.slice(hosts=0).who.call()) == 4

    simulate(story)


def test_policy_restart_brings_a_new_incarnation_and_old_handles_are_refused():
    async def story():
        async with SimulatedCluster(2) as cluster:
            policy = Policy(on_death="restart", backoff_s=0.5)
            mesh = await cluster.controller.spawn("m", Probe, "welcome back", dims=EIGHT, policy=policy)
            seeker = await cluster.controller.spawn("seeker", Probe)
            old = mesh.from_plain(mesh.to_plain())
            cluster.worker(mesh, 6).kill_9()
            await cluster.event("worker_restarted", "m[6]")
            assert mesh.failure is None
            assert mesh._info.incarnations[6] > old._info.incarnations[6]
            assert await seeker.ask_stale.call_one(old) == StaleHandle.code
            assert len(await seeker.find_and_ask.call_one("m")) == 8
            assert await mesh.slice(hosts=1, gpus=2).greet.call_one("x") == "welcome back, x"

    simulate(story)


def test_a_rank_that_comes_back_is_not_called_before_its_actor_is_there():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, policy=Policy(on_death="restart", backoff_s=0.01))
            cluster.worker(mesh, 0).kill_9()
            outcomes = []
            while not cluster.events("worker_restarted"):
                outcomes.append(asyncio.create_task(outcome(mesh.greet.call_one("x"))))
                await asyncio.sleep(0.00005)
            kinds = {type(await told).__name__ for told in outcomes}
            assert kinds == {"WorkerDied", "StaleHandle", "str"}

    simulate(story)


def test_a_rank_that_dies_as_soon_as_it_is_back_comes_back_again():
    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy(on_death="restart", backoff_s=0.01, backoff_cap_s=0.01, max_restarts=1000)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy)
            cluster.worker(mesh, 0).kill_9()
            for moment_s in range(0, 600, 10):  # microseconds after its process came up, until after its construction
                num_started = len(cluster.nodes["node-0"].starter.started)
                await cluster.until(lambda number=num_started: len(cluster.nodes["node-0"].starter.started) > number)
                await asyncio.sleep(moment_s / 100_000)
                for worker in cluster.living:
                    worker.kill_9()
            await asyncio.sleep(120.0)
            assert mesh.failure is None
            assert await mesh.greet.call_one("x") == "hello, x"

    simulate(story)


def test_policy_kill_group_kills_the_survivors_and_frees_the_devices():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT, policy=Policy(on_death="kill_group"))
            waiting = mesh.slice(hosts=0).wait.call(1000.0)
            began = cluster.now
            cluster.worker(mesh, 6).kill_9()
            await cluster.event("mesh_failed")
            assert cluster.now - began < 0.1
            assert cluster.living == []
            assert "first to die: rank 6" in mesh.failure.what
            assert isinstance(await outcome(waiting), WorkerDied)

    simulate(story)


def test_a_whole_group_comes_back_together():
    async def story():
        async with SimulatedCluster(2) as cluster:
            policy = Policy(on_death="restart", whole_group=True)
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT, policy=policy)
            before = dict(mesh._info.incarnations)
            cluster.worker(mesh, 3).kill_9()
            await cluster.until(lambda: len(cluster.events("worker_restarted")) == 8)
            assert all(mesh._info.incarnations[rank] > before[rank] for rank in before)
            assert len(await mesh.who.call()) == 8
            assert len(cluster.living) == 8

    simulate(story)


def test_a_budget_that_is_used_up_fails_the_mesh_with_all_causes():
    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy(on_death="restart", max_restarts=2, backoff_s=0.1)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy)
            for code in (3, 4, 5):
                await cluster.until(lambda: len(cluster.living) == 1 and mesh._supervisor.ranks[0].state == "up")
                cluster.worker(mesh, 0).exit(code)
            await cluster.event("mesh_failed")
            evidence = mesh.failure.evidence
            assert [f"exit code {code}" in evidence for code in (3, 4, 5)] == [True] * 3
            assert "2 restarts" in mesh.failure.what

    simulate(story)


def test_a_worker_that_dies_in_its_respawn_counts_against_the_budget():
    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy(on_death="restart", max_restarts=2, backoff_s=0.1)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy)
            cluster.nodes["node-0"].starter.fate = lambda spec: Fate.DIES_BEFORE_HELLO
            cluster.worker(mesh, 0).kill_9()
            await cluster.event("mesh_failed")
            assert "respawn failed" in mesh.failure.evidence
            assert cluster.living == []

    simulate(story)


def test_a_lock_goes_to_the_next_when_its_holder_dies():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"hosts": 2, "gpus": 2})
            first = mesh.slice(hosts=0, gpus=0).hold.call_one("weights", 1000.0)
            await asyncio.sleep(0.1)
            others = mesh.slice(hosts=1).hold.call("weights", 2.0)
            queued = mesh.slice(hosts=0, gpus=1).hold.call_one("weights", 2.0)
            await asyncio.sleep(0.1)
            died_at = cluster.now
            cluster.worker(mesh, 0).kill_9()
            assert isinstance(await outcome(first), WorkerDied)
            held = sorted([*(await others).values, await queued])
            assert [token for token, _, _ in held] == [2, 3, 4]
            assert held[0][1] - died_at < 0.01
            for (_, _, until), (_, since, _) in itertools.pairwise(held):
                assert since >= until  # never two at once
            assert cluster.controller.locks.snapshot() == {}

    simulate(story)


def test_a_lock_whose_waiter_dies_skips_it():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"ranks": 3})
            calls = []
            for rank in range(3):
                calls.append(mesh.slice(ranks=rank).hold.call_one("weights", 2.0))
                await asyncio.sleep(0.1)
            cluster.worker(mesh, 1).kill_9()
            assert isinstance(await outcome(calls[1]), WorkerDied)
            assert (await calls[0])[0] == 1
            assert (await calls[2])[0] == 2

    simulate(story)


# -- silence of workers ----------------------------------------------------------------------------------------


def test_a_frozen_worker_is_reported_within_six_seconds_and_not_killed():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            worker = cluster.worker(mesh, 6)
            worker.freeze()
            pending = mesh.slice(hosts=1, gpus=2).count.call_one("once")
            began = cluster.now
            at, event = await cluster.event("worker_silent", "m[6]")
            assert at - began < 6.0
            assert "SIGSTOP" in event.text
            assert "stopped" in event.fields["stack"]
            await asyncio.sleep(120.0)
            assert worker.state() == "T"
            worker.thaw()
            assert await pending == 1
            await asyncio.sleep(30.0)
            assert worker.state() == "S"
            assert mesh._supervisor.ranks[6].state == "up"
            assert cluster.events("worker_died") == []

    simulate(story)


def test_a_worker_that_hangs_for_longer_than_its_policy_allows_is_killed():
    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy(on_death="restart", hang_timeout_s=30.0)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy)
            worker = cluster.worker(mesh, 0)
            began = cluster.now
            worker.freeze()
            await cluster.event("worker_restarted", "m[0]")
            assert 28.0 < worker.gone_at - began < 36.0
            assert "hung" in "".join(mesh._supervisor._supervision.causes)
            assert await mesh.greet.call_one("x") == "hello, x"

    simulate(story)
