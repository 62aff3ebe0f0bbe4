"""The network between agent and controller fails: sessions resume, leases fence, nothing runs twice."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest
from support.actors import Victim
from support.cluster import DEADLINE_S, SHORT, Proxy, error_of, known, real_cluster
from support.procs import alive, eventually

from miles_agents.rpc.errors import NodeLost, PeerFault
from miles_agents.timings import Timings

pytestmark = pytest.mark.full
STEADY = Timings(beat_s=0.2, suspect_s=1.0, fence_s=8.0, dead_s=10.0)


@asynccontextmanager
async def behind_a_proxy(run_dir, timings):
    """A cluster of one node that dials a proxy; yields both."""
    async with Proxy() as proxy, real_cluster(run_dir, timings=timings, address=proxy.lead_to) as cluster:
        yield cluster, proxy


async def test_a_cut_of_two_seconds_resumes_the_session_and_nothing_runs_twice(tmp_path, took):
    notes = tmp_path / "notes"
    async with behind_a_proxy(tmp_path / "run", STEADY) as (cluster, proxy):
        mesh = await cluster.controller.spawn("steady", Victim)
        cluster.identities()
        pid, before = known(await mesh.pid.call_one()), proxy.num_connections
        calls = [mesh.note.call_one(str(notes), f"n{number}") for number in range(100)]
        proxy.cut()
        calls += [mesh.note.call_one(str(notes), f"n{number}") for number in range(100, 200)]
        await cluster.event("node_link_down", "node-0")
        await cluster.event("node_suspect", "node-0")
        await asyncio.wait_for(_silence(cluster, 2.0), DEADLINE_S)
        at = time.perf_counter()
        proxy.heal()
        async with asyncio.timeout(DEADLINE_S):
            pids = [await call for call in calls]
        took("heal to last answer", at)
        assert set(pids) == {pid.pid} and alive(pid)
        assert notes.read_text().split() == [f"n{number}" for number in range(200)]
        assert proxy.num_connections > before
        assert not cluster.events("node_dead") and len(cluster.events("node_joined")) == 1


async def test_a_cut_beyond_the_lease_fences_the_node_which_joins_as_another_life(tmp_path, took):
    async with behind_a_proxy(tmp_path / "run", SHORT) as (cluster, proxy):
        mesh = await cluster.controller.spawn("cut-off", Victim)
        cluster.identities()
        agent, worker = known(cluster.agent()), known(await mesh.pid.call_one())
        old = cluster.controller.fabric.find("node-0").incarnation
        pending = mesh.hang.call_one()
        await mesh.pid.call_one()
        at = time.perf_counter()
        proxy.cut()
        error = await error_of(pending, NodeLost)
        took("cut to error", at)
        assert not alive(worker), "the node was given up while its worker still ran"
        assert (error.fields["may_have_run"] is True and "no beat" in str(error)) or "silent" in str(error)
        proxy.heal()
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        assert cluster.controller.fabric.find("node-0").incarnation > old
        assert alive(agent), "the agent itself goes on"
        await error_of(mesh.echo.call_one(1), PeerFault)
        await mesh.stop(grace_s=0.2)
        again = await cluster.controller.spawn("again", Victim)
        assert await again.echo.call_one("back") == "back"


async def test_an_agent_that_never_heard_that_it_had_joined_joins_once_more(tmp_path):
    async with behind_a_proxy(tmp_path / "run", SHORT) as (cluster, proxy):
        proxy.cut()
        await cluster.event("node_dead", "node-0")
        proxy.heal()
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        proxy.cut()  # this time the WELCOME is on its way
        await cluster.event("node_dead", "node-0", fits=lambda event: event is not cluster.events("node_dead")[0])
        proxy.heal()
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        mesh = await cluster.controller.spawn("again", Victim)
        assert await mesh.echo.call_one("back") == "back"


async def test_an_agent_that_comes_back_after_its_node_was_dismissed_is_sent_away(tmp_path):
    async with behind_a_proxy(tmp_path / "run", SHORT) as (cluster, proxy):
        proxy.cut()
        await cluster.event("node_dead", "node-0")
        await cluster.controller.dismiss("node-0", reason="the machine is needed elsewhere")
        proxy.heal()
        agent = cluster.agents.agents["node-0"]
        assert await asyncio.wait_for(asyncio.shield(agent.exited), DEADLINE_S) != 0
        assert "the machine is needed elsewhere" in cluster.log()
        assert not cluster.controller.fabric.nodes


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_one_way_stall_never_lets_two_lives_overlap(tmp_path, direction, took):
    async with behind_a_proxy(tmp_path / "run", SHORT) as (cluster, proxy):
        mesh = await cluster.controller.spawn("stalled", Victim)
        cluster.identities()
        worker = known(await mesh.pid.call_one())
        at = time.perf_counter()
        proxy.stall(direction)
        pending = mesh.hang.call_one()
        error = await error_of(pending, PeerFault)
        took("stall to error", at)
        assert not alive(worker), "the call was given up while its worker still ran"
        assert "may_have_run" in error.fields
        proxy.heal()
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        await mesh.stop(grace_s=0.2)
        again = await cluster.controller.spawn("again", Victim)
        assert await again.echo.call_one("back") == "back"


async def test_a_short_stall_in_both_directions_costs_nothing(tmp_path):
    async with behind_a_proxy(tmp_path / "run", STEADY) as (cluster, proxy):
        mesh = await cluster.controller.spawn("steady", Victim)
        worker = known(await mesh.pid.call_one())
        proxy.stall("up", "down")
        pending = [mesh.echo.call_one(number) for number in range(50)]
        await cluster.event("node_suspect", "node-0")
        proxy.heal()
        async with asyncio.timeout(DEADLINE_S):
            assert [await call for call in pending] == list(range(50))
        await cluster.event("node_recovered", "node-0")
        assert alive(worker) and not cluster.events("node_dead")


async def _silence(cluster, seconds):
    """Until the controller has not heard the node for so long."""
    member = cluster.controller.fabric.membership.members["node-0"]
    loop = asyncio.get_running_loop()
    await eventually(lambda: loop.time() - member.heard_at > seconds, DEADLINE_S)
