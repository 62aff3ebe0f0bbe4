"""How a life of an agent ends: who gets grace and who none, what will not die, who hears of it. Virtual time."""

import asyncio

import pytest
from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import Probe

from miles_agents.agent.lease import Fence
from miles_agents.agent.worker_ending import WorkerWouldNotDie
from miles_agents.timings import Timings
from miles_controller import Policy

SHORT = Timings(beat_s=0.2, suspect_s=1.0, fence_s=2.0, dead_s=3.0)
LONG_GRACE = {"term_grace_s": 30.0}


async def stubborn(cluster, **options):
    """A mesh of one whose worker does not heed TERM, and the worker."""
    mesh = await cluster.controller.spawn("m", Probe, **LONG_GRACE, **options)
    worker = cluster.worker(mesh, 0)
    worker.stubborn = True
    return mesh, worker


async def end_of(cluster, worker, *, timeout_s=100.0):
    """How long it takes from now until the worker is gone."""
    began = cluster.now
    await cluster.until(lambda: worker.gone_at is not None, timeout_s=timeout_s)
    return worker.gone_at - began


def test_a_fence_leaves_no_grace_to_a_worker_that_is_being_stopped():
    async def story():
        async with SimulatedCluster(1, timings=SHORT) as cluster:
            mesh, worker = await stubborn(cluster)
            stop = asyncio.ensure_future(mesh.stop())
            await asyncio.sleep(0.7)
            cluster.nodes["node-0"].agent.end(Fence("the reaper died"))
            assert await end_of(cluster, worker) < 0.01
            await outcome(stop)

    simulate(story)


def test_an_order_with_less_grace_takes_the_place_of_the_one_before():
    async def story():
        async with SimulatedCluster(1) as cluster:
            _, worker = await stubborn(cluster)
            pool = cluster.nodes["node-0"].agent.workers
            entry = pool.find(worker.spec.mesh, 0, worker.spec.incarnation)
            began = cluster.now
            slow = asyncio.ensure_future(pool.end(entry, "stop", 30.0))
            await asyncio.sleep(1.0)
            longer = asyncio.ensure_future(pool.end(entry, "once more", 60.0))
            await asyncio.sleep(1.0)
            assert worker.gone_at is None
            quick = asyncio.ensure_future(pool.end(entry, "kill", 0.0))
            ends = await asyncio.gather(slow, longer, quick)
            assert cluster.now - began < 2.01
            assert len(set(ends)) == 1 and "it was ended because stop" in ends[0]

    simulate(story)


def test_an_agent_that_ends_in_good_order_holds_its_node_until_nothing_runs_any_more():
    async def story():
        async with SimulatedCluster(1, timings=SHORT) as cluster:
            _, worker = await stubborn(cluster)
            began = cluster.now
            cluster.nodes["node-0"].agent.end(Fence("SIGTERM received", orderly=True))
            at, _ = await cluster.event("node_gone")
            assert worker.gone_at == pytest.approx(began + 30.0, abs=0.1)
            assert worker.gone_at <= at < worker.gone_at + 0.1
            assert not cluster.events("node_dead") and not cluster.events("node_suspect")

    simulate(story)


def test_a_lease_that_runs_out_during_an_orderly_end_takes_all_grace():
    async def story():
        async with SimulatedCluster(1, timings=SHORT) as cluster:
            _, worker = await stubborn(cluster)
            cluster.nodes["node-0"].agent.end(Fence("SIGTERM received", orderly=True))
            await asyncio.sleep(0.5)
            cluster.partition("node-0")
            took = await end_of(cluster, worker)
            assert SHORT.fence_s - SHORT.beat_s - 0.1 < took <= SHORT.fence_s
            at, _ = await cluster.event("node_dead")
            assert worker.gone_at < at

    simulate(story)


def test_ending_a_worker_that_cannot_be_killed_is_an_error_that_names_it():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            worker = cluster.worker(mesh, 0)
            worker.unkillable = True
            pool = cluster.nodes["node-0"].agent.workers
            entry = pool.find(worker.spec.mesh, 0, worker.spec.incarnation)
            error = await outcome(pool.end(entry, "a test", 0.0))
            assert isinstance(error, WorkerWouldNotDie), error
            assert error.code == "E-PEER-007" and f"pid {worker.pid} state D" in error.evidence
            worker.unkillable = False  # what it waited for answered: asked again, it ends
            assert "ended because" in await pool.end(entry, "a test", 0.0)

    simulate(story)


@pytest.mark.parametrize("orderly", [False, True])
def test_an_agent_with_an_unkillable_worker_ends_in_bounded_time_and_names_it(orderly):
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            worker = cluster.worker(mesh, 0)
            worker.unkillable = True
            node = cluster.nodes["node-0"]
            node.agent.end(Fence("a test ends it", orderly=orderly))
            await node.wait_ended(timeout_s=60.0)
            assert not node.is_running and len(node.lives) == 1
            error = node.lives[0].over
            assert isinstance(error, WorkerWouldNotDie) and f"m[0]: pid {worker.pid} state D" in error.evidence
            _, event = await cluster.event("node_gone")
            assert f"pid {worker.pid} state D" in event.text

    simulate(story)


def test_a_rank_is_started_anew_only_when_its_predecessor_left_nothing_and_that_costs_no_budget():
    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy("restart", max_restarts=1, backoff_s=0.0)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy)
            worker = cluster.worker(mesh, 0)
            worker.sweep_s = 5.0
            killed_at = cluster.now
            worker.kill_9()
            await cluster.until(lambda: len(cluster.living) == 1, timeout_s=20.0)
            assert cluster.now - killed_at > 5.0
            await asyncio.sleep(1.0)
            assert mesh.failure is None and (await mesh.who.call_one())[1] == 0

    simulate(story)


def test_a_goodbye_that_is_lost_is_said_again():
    async def story():
        async with SimulatedCluster(1) as cluster:
            await cluster.controller.spawn("m", Probe)
            node = cluster.nodes["node-0"]
            began = cluster.now
            cluster.partition("node-0", towards="controller")
            node.agent.end(Fence("SIGTERM received", orderly=True))
            await asyncio.sleep(0.5)
            cluster.heal("node-0")
            at, event = await cluster.event("node_gone")
            assert at - began < 1.0 and "SIGTERM" in event.text
            await node.wait_ended(timeout_s=10.0)
            assert node.lives[0].ended_at - at < 0.2  # it knows that it was heard

    simulate(story)


def test_a_goodbye_that_nobody_hears_costs_a_second():
    async def story():
        async with SimulatedCluster(1) as cluster:
            node = cluster.nodes["node-0"]
            cluster.partition("node-0")
            began = cluster.now
            node.agent.end(Fence("SIGTERM received", orderly=True))
            await node.wait_ended(timeout_s=10.0)
            assert node.lives[0].ended_at - began < 2.2  # and one for the logs

    simulate(story)


@pytest.mark.parametrize("broken", ["logs.finish", "logs.poll", "logs.run", "_report", "link.end_session"])
def test_what_fails_in_the_background_costs_neither_the_node_nor_a_death(broken):
    """A part of the agent that raises (a log that became a directory, say) is logged, and everything else goes on."""

    async def story():
        async with SimulatedCluster(1) as cluster:
            innocent = await cluster.controller.spawn("innocent", Probe)
            mesh = await cluster.controller.spawn("m", Probe)
            pool = cluster.nodes["node-0"].agent.workers
            part, _, name = broken.rpartition(".")
            setattr(getattr(pool, part) if part else pool, name, fail)
            await asyncio.sleep(2.0)
            call = mesh.wait.call_one(50.0)
            await asyncio.sleep(1.0)
            cluster.worker(mesh, 0).kill_9()
            error = await outcome(call)
            assert "SIGKILL" in error.what
            await cluster.until(lambda: len(cluster.living) == 1, timeout_s=5.0)
            await asyncio.sleep(30.0)
            assert await innocent.greet.call_one("x") == "hello, x"
            assert len(cluster.nodes["node-0"].lives) == 1
            assert len(pool.facts()) == 1  # the dead one was buried, so its name is free

    simulate(story)


def fail(*args, **kwargs):
    raise OSError("Is a directory")


def test_an_agent_that_is_told_to_end_before_its_welcome_comes_says_goodbye_all_the_same():
    async def story():
        async with SimulatedCluster(1, join=False, latency_s=0.3) as cluster:
            node = cluster.nodes["node-0"]
            node.start()
            await cluster.event("node_joined")
            began = cluster.now
            assert node.agent.orders is None, "its WELCOME is under way"
            node.agent.end(Fence("SIGTERM received", orderly=True))
            at, gone = await cluster.event("node_gone")
            assert gone.text == "it said goodbye: SIGTERM received"
            assert at - began < 2.0
            await node.wait_ended(timeout_s=5.0)
            assert not node.is_running and not cluster.events("node_dead")

    simulate(story)


@pytest.mark.parametrize("is_cut_off", [True, False])
def test_an_agent_that_nobody_answers_ends_soon_when_it_is_told_to(is_cut_off):
    async def story():
        async with SimulatedCluster(1, join=False) as cluster:
            if is_cut_off:
                cluster.partition("node-0")
            else:
                cluster.partition("node-0", towards="node")
            node = cluster.nodes["node-0"]
            node.start()
            await asyncio.sleep(0.5)
            node.agent.end(Fence("SIGTERM received", orderly=True))
            await node.wait_ended(timeout_s=2.0)
            assert not node.is_running

    simulate(story)
