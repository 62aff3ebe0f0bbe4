"""An agent, its reaper or both die: callers are told, nothing of the node is left, the run goes on."""

import asyncio
import signal
import time

import pytest
from support.actors import Victim
from support.cluster import SHORT, all_gone, error_of, kill, known, real_cluster
from support.process_cases import alive as still_alive
from support.process_cases import reported
from support.procs import alive, eventually

from miles_agents.rpc.errors import NodeLost, PeerFault, WorkerDied


async def two_nodes(cluster, *args):
    """One rank on each node, and what runs on the first one."""
    mesh = await cluster.controller.spawn("pair", Victim, *args, dims={"hosts": 2})
    cluster.identities()
    first, second = mesh.slice(hosts=0), mesh.slice(hosts=1)
    on_first = [known(pid) for pid in (cluster.reaper(), cluster.agent(), await first.pid.call_one())]
    return mesh, first, second, on_first


async def test_a_killed_agent_is_dead_at_once_when_its_reaper_vouches_for_the_node(tmp_path, took):
    async with real_cluster(tmp_path, num_nodes=2) as cluster:
        mesh, first, second, on_first = await two_nodes(cluster)
        pending = first.hang.call_one()
        await first.pid.call_one()
        at = kill(cluster.agent())
        error = await error_of(pending, PeerFault)
        took("kill to error", at)
        assert isinstance(error, NodeLost) and error.code == "E-PEER-002"
        assert "node-0" in error.what and error.fields["may_have_run"] is True
        assert "reaper" in str(error) and "137" in str(error)
        assert not any(map(alive, on_first)), "the news came before the node was clean"
        assert await second.echo.call_one(1) == 1
        assert isinstance(await error_of(first.echo.call_one(1), PeerFault), NodeLost)
        assert "node-0" in (await asyncio.wait_for(mesh.wait_failed(), 20)).evidence
        await mesh.stop(grace_s=0.2)


@pytest.mark.full
async def test_a_killed_agent_without_proof_is_dead_when_its_lease_ends(tmp_path, took):
    async with real_cluster(tmp_path, num_nodes=2, timings=SHORT, tells_exits=False) as cluster:
        _mesh, first, second, on_first = await two_nodes(cluster)
        pending = first.hang.call_one()
        await first.pid.call_one()
        at = kill(cluster.agent())
        await all_gone(on_first)
        took("kill to clean", at)
        await error_of(pending, NodeLost)
        took("kill to error", at)
        took_s = time.perf_counter() - at
        assert took_s > SHORT.dead_s - 2 * SHORT.beat_s, "it was declared dead before its lease was over"
        assert cluster.events("node_suspect", "node-0") and cluster.events("node_dead", "node-0")
        assert await second.echo.call_one(1) == 1


async def test_a_killed_reaper_ends_its_node_at_once_and_the_agent_says_so(tmp_path, took):
    async with real_cluster(tmp_path, num_nodes=2) as cluster:
        _, first, second, on_first = await two_nodes(cluster)
        pending = first.hang.call_one()
        await first.pid.call_one()
        at = kill(cluster.reaper())
        error = await error_of(pending, PeerFault)
        took("kill to error", at)
        assert error.fields["may_have_run"] is True
        gone = await cluster.event("node_gone", "node-0")
        assert "the reaper died" in gone.text and not alive(on_first[2])
        await all_gone(on_first)
        assert await second.echo.call_one(1) == 1


@pytest.mark.full
async def test_agent_and_reaper_killed_together_leave_no_worker(tmp_path, took):
    async with real_cluster(tmp_path, num_nodes=2, timings=SHORT) as cluster:
        _, first, second, on_first = await two_nodes(cluster)
        pending = first.hang.call_one()
        await first.pid.call_one()
        reaper, agent = cluster.reaper(), cluster.agent()
        kill(reaper, signal.SIGSTOP)  # else it would clean up in between
        kill(agent)
        at = kill(reaper)
        await all_gone(on_first)
        took("kill to clean", at)
        error = await error_of(pending, NodeLost)
        took("kill to error", at)
        assert "node-0" in error.what
        assert await second.echo.call_one(1) == 1


async def test_evading_grandchildren_are_gone_after_the_agent_was_killed(tmp_path, took):
    path = tmp_path / "evaders"
    async with real_cluster(tmp_path / "run", num_nodes=1) as cluster:
        mesh = await cluster.controller.spawn("parents", Victim, "evader", str(path))
        await eventually(lambda: len(reported(path, "evader")) == 2 and reported(path, "member"), 20.0)
        cluster.identities()
        pending = mesh.hang.call_one()
        at = kill(cluster.agent())
        await error_of(pending, NodeLost)
        took("kill to error", at)
        assert still_alive(reported(path)) == [], "the node was reported clean"


@pytest.mark.full
async def test_a_stopped_agent_loses_its_node_and_joins_again_as_another_life(tmp_path, took):
    async with real_cluster(tmp_path, num_nodes=2, timings=SHORT) as cluster:
        mesh, first, second, on_first = await two_nodes(cluster)
        old = cluster.controller.fabric.find("node-0").incarnation
        pending = first.hang.call_one()
        await first.pid.call_one()
        at = kill(cluster.agent(), signal.SIGSTOP)
        error = await error_of(pending, NodeLost)
        took("stop to error", at)
        assert "node-0" in error.what and error.fields["may_have_run"] is True
        worker = on_first[2]
        await all_gone([worker])  # it fences itself: its agent does not answer its beats
        assert await second.echo.call_one(1) == 1
        kill(cluster.agent(), signal.SIGCONT)
        await cluster.controller.wait_for_nodes("node-0", timeout_s=30)
        assert cluster.controller.fabric.find("node-0").incarnation > old
        assert isinstance(await error_of(first.echo.call_one(1), PeerFault), NodeLost | WorkerDied)
        await mesh.stop(grace_s=0.2)
        again = await cluster.controller.spawn("again", Victim, dims={"hosts": 2})
        assert list((await again.echo.call("back")).values) == ["back"] * 2


async def test_a_terminated_agent_leaves_in_good_order_and_its_ranks_are_gone(tmp_path):
    async with real_cluster(tmp_path, num_nodes=2) as cluster:
        _, first, second, on_first = await two_nodes(cluster)
        pending = first.hang.call_one()
        await first.pid.call_one()
        kill(cluster.agent(), signal.SIGTERM)
        error = await error_of(pending, PeerFault)
        assert error.fields["may_have_run"] is True
        await all_gone(on_first)
        assert await second.echo.call_one(1) == 1
