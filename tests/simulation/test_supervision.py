"""Supervision under odd circumstances: a full disk, code of the owner that raises, ends that are not confirmed."""

import asyncio

import pytest
from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import EXECUTED, Closer, Probe

from miles_agents.rpc.errors import NodeLost, WorkerDied
from miles_controller import Policy
from miles_controller.owned_mesh import MeshFailed
from miles_controller.rank_end import NotEnded

TWO_NODES = {"hosts": 2, "r": 1}
QUIET_S = 900.0


async def failure_of(mesh, *, within_s=600.0):
    async with asyncio.timeout(within_s):
        return await mesh.wait_failed()


def test_a_full_disk_does_not_turn_supervision_off(tmp_path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")

    async def story():
        async with SimulatedCluster(2, run_dir=tmp_path) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, policy=Policy("restart"))
            wide = await cluster.controller.spawn("n", Probe, dims={"hosts": 2, "r": 1})
            cluster.worker(mesh, 0).kill_9()
            await cluster.event("worker_restarted", "m[0]")
            pending = wide.slice(hosts=1).wait.call_one(1e5)
            await asyncio.sleep(1.0)
            await cluster.nodes["node-1"].crash()
            async with asyncio.timeout(cluster.timings.dead_s + 5.0):
                assert isinstance(await outcome(pending), NodeLost)
            assert cluster.controller.fabric.find("node-1") is None

    simulate(story)


# -- ends that are not confirmed -------------------------------------------------------------------------------


def test_a_stop_that_leaves_a_process_behind_says_so_and_keeps_its_place():
    async def story():
        async with SimulatedCluster(2, cpu_slots=1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=TWO_NODES)
            stuck, other = cluster.worker(mesh, 0), cluster.worker(mesh, 1)
            stuck.unkillable = True
            error = await outcome(mesh.stop())
            assert isinstance(error, NotEnded)
            assert error.fields["ranks"] == [0]
            assert "m[0] on node-0" in error.what and "m[1]" not in error.what
            assert other.gone_at is not None
            assert cluster.controller.find_mesh("m") is not None
            assert not {node.name: node.free for node in cluster.controller.inventory().nodes}["node-0"]
            assert await failure_of(mesh) is None
            stuck.kill_9()  # the system call returned at last
            await cluster.event("mesh_stopped", "m")
            assert cluster.controller.find_mesh("m") is None
            assert all(node.free for node in cluster.controller.inventory().nodes)
            await mesh.stop()  # and again, for whoever does not know

    simulate(story)


def test_a_group_with_a_rank_that_cannot_be_killed_has_failed_all_the_same():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=TWO_NODES, policy=Policy("kill_group"))
            stuck = cluster.worker(mesh, 0)
            stuck.unkillable = True
            cluster.worker(mesh, 1).kill_9()
            assert "m[0] on node-0" in (await failure_of(mesh)).what
            stuck.unkillable = False
            stuck.kill_9()

    simulate(story)


def test_actors_that_live_are_closed_also_when_others_are_dead():
    async def story():
        async with SimulatedCluster(1) as cluster:
            EXECUTED.clear()
            mesh = await cluster.controller.spawn("m", Closer, dims={"r": 3})
            cluster.worker(mesh, 1).kill_9()
            await failure_of(mesh)
            await mesh.stop()
            assert dict(EXECUTED) == {("closed", 0): 1, ("closed", 2): 1}
            assert not cluster.events("close_failed")

    simulate(story)


# -- code of the owner that raises -----------------------------------------------------------------------------


def test_a_respawn_whose_environment_cannot_be_made_is_a_death_like_any_other():
    asked = []

    def rank_env(rank):
        asked.append(rank)
        if len(asked) > 1:
            raise KeyError("MASTER_ADDR")
        return {}

    async def story():
        async with SimulatedCluster(1) as cluster:
            policy = Policy("restart", max_restarts=2)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy, rank_env=rank_env)
            cluster.worker(mesh, 0).kill_9()
            failure = await failure_of(mesh)
            assert isinstance(failure, MeshFailed)
            assert "KeyError('MASTER_ADDR')" in failure.what and "\n" not in failure.what
            assert "in rank_env" in failure.evidence
            assert len(asked) == 3

    simulate(story)


def test_a_policy_that_raises_fails_the_mesh():
    def decide(death):
        raise ZeroDivisionError(death.rank)

    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, policy=Policy(decide))
            cluster.worker(mesh, 0).kill_9()
            assert "ZeroDivisionError" in (await failure_of(mesh)).what

    simulate(story)


# -- waiting for a failure that does not come ------------------------------------------------------------------


def test_whoever_waits_for_a_failure_is_told_that_the_mesh_was_stopped():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            waiting = asyncio.create_task(failure_of(mesh))
            await asyncio.sleep(1.0)
            await mesh.stop()
            assert await waiting is None
            assert await failure_of(mesh) is None
            assert mesh.failure is None

    simulate(story)


def test_a_mesh_all_of_whose_nodes_are_dismissed_is_stopped():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=TWO_NODES, policy=Policy("restart"))
            waiting = asyncio.create_task(failure_of(mesh))
            await cluster.controller.dismiss("node-0", reason="scale down")
            assert not waiting.done()
            await cluster.controller.dismiss("node-1", reason="scale down")
            assert await waiting is None
            assert cluster.controller.find_mesh("m") is None
            assert not cluster.controller.fabric.workers

    simulate(story)


@pytest.mark.parametrize("kind", ["fail", "kill_group"])
def test_ranks_elsewhere_stay_supervised_when_a_node_is_dismissed(kind):
    async def story():
        async with SimulatedCluster(3) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"hosts": 3, "r": 1}, policy=Policy(kind))
            await cluster.controller.dismiss("node-1", reason="scale down")
            await asyncio.sleep(QUIET_S)
            assert mesh.failure is None
            cluster.worker(mesh, 0).kill_9()
            assert "rank 0" in (await failure_of(mesh)).what
            assert len(cluster.living) == (1 if kind == "fail" else 0)

    simulate(story)


# -- what is known of calls to the dead ------------------------------------------------------------------------


@pytest.mark.parametrize("whole_node", [False, True])
def test_a_call_made_after_the_death_has_not_run_and_one_before_it_may_have(whole_node):
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=TWO_NODES)
            caller = await cluster.controller.spawn("caller", Probe)
            pending = mesh.slice(hosts=1).wait.call_one(1e5)
            from_worker = caller.wait_for.call_one(mesh.slice(hosts=1), 1e5)
            await asyncio.sleep(1.0)
            if whole_node:
                await cluster.nodes["node-1"].crash()
            else:
                cluster.worker(mesh, 1).kill_9()
            for call in (pending, from_worker):
                assert (await outcome(call)).fields["may_have_run"] is True
            await failure_of(mesh)
            for call in (mesh.slice(hosts=1).greet.call_one("x"), caller.wait_for.call_one(mesh.slice(hosts=1), 1.0)):
                error = await outcome(call)
                assert isinstance(error, NodeLost if whole_node else WorkerDied)
                assert error.fields["may_have_run"] is False

    simulate(story)


# -- news of deaths that come late -----------------------------------------------------------------------------


def test_news_of_the_end_of_an_earlier_reaper_leaves_its_successor_alone():
    async def story():
        async with SimulatedCluster(1) as cluster:
            node, controller = cluster.nodes["node-0"], cluster.controller
            first = node.reaper
            await node.crash()
            controller.report_node_exit("node-0", "seen at once", reaper=first)
            assert controller.fabric.find("node-0") is None
            node.start()
            await controller.wait_for_nodes()
            mesh = await controller.spawn("m", Probe)
            controller.report_node_exit("node-0", "seen by somebody slow", reaper=first)
            assert await mesh.greet.call_one("x") == "hello, x"
            await node.crash()
            controller.report_node_exit("node-0", "seen", reaper=node.reaper)
            assert isinstance(await outcome(mesh.greet.call_one("x")), NodeLost)

    simulate(story)


def test_a_node_knows_its_workers_through_restarts_moves_and_ends():
    async def story():
        async with SimulatedCluster(3, cpu_slots=2) as cluster:
            fabric = cluster.controller.fabric
            policy = Policy("restart")
            mesh = await cluster.controller.spawn("m", Probe, dims={"hosts": 2, "r": 2}, policy=policy)

            def check(where):
                assert {node.name: sorted(node.workers) for node in fabric.nodes if node.workers} == where
                assert sum(len(node.workers) for node in fabric.nodes) == len(fabric.workers)

            number = mesh._info.mesh
            check({"node-0": [(number, 0), (number, 1)], "node-1": [(number, 2), (number, 3)]})
            cluster.worker(mesh, 0).kill_9()
            await cluster.event("worker_restarted", "m[0]")
            lost = fabric.find("node-1")
            await cluster.nodes["node-1"].crash()
            await cluster.event("worker_restarted", "m[3]")
            await cluster.event("worker_restarted", "m[2]")
            check({"node-0": [(number, 0), (number, 1)], "node-2": [(number, 2), (number, 3)]})
            assert not lost.workers
            await mesh.stop()
            check({})

    simulate(story)
