"""Agents on several hosts, joined over tcp: work across hosts, and links that are cut, slow, lossy; hosts that go."""

import asyncio

import pytest
from support.actors import Victim
from support.cluster import error_of
from support.host_agents import DEADLINE_S, LEASES, PATIENT, host_cluster
from support.netns import HERE
from support.procs import eventually
from support.store_actors import Keeper

from miles_agents.errors import PeerFault
from miles_agents.rpc.errors import NodeLost
from miles_agents.store.errors import PullFailed

pytestmark = [pytest.mark.full, pytest.mark.needs("hosts"), pytest.mark.timeout(600)]
MIB = 1 << 20


async def keepers(cluster):
    """A worker on each of the hosts, in the order of their names."""
    mesh = await cluster.controller.spawn("keepers", Keeper, dims={"hosts": len(cluster.net.hosts), "gpus": 2})
    return [mesh.slice(hosts=host, gpus=0) for host in range(len(cluster.net.hosts))]


@pytest.mark.long
async def test_hosts_join_call_and_fetch_from_each_other_and_a_link_between_two_is_their_own_affair(tmp_path, net):
    async with host_cluster(tmp_path / "run", net, timings=PATIENT) as cluster:
        first, second, third = await keepers(cluster)
        ref = await first.put_zeros.call_one(5 * MIB, 9)
        assert await second.summary.call_one(ref) == [5 * MIB, 9, 9]
        other = await first.put_zeros.call_one(5 * MIB, 7)
        net.cut("node1", "node2")
        await error_of(second.summary.call_one(other, 3.0), PullFailed)
        assert await third.summary.call_one(other) == [5 * MIB, 7, 7]
        net.mend("node1", "node2")
        assert await second.summary.call_one(other, 60.0) == [5 * MIB, 7, 7]
        assert not cluster.events("node_suspect") and not cluster.events("node_dead")


async def test_a_host_whose_link_is_cut_ends_what_runs_on_it_and_joins_again_as_another_life(tmp_path, net):
    async with host_cluster(tmp_path / "run", net, timings=LEASES) as cluster:
        mesh = await cluster.controller.spawn("victims", Victim, dims={"hosts": 3, "gpus": 1})
        before = {name: cluster.incarnation(name) for name in net.hosts}
        running = net["node2"].processes()
        pending = mesh.slice(hosts=1).hang.call_one()
        await mesh.pid.call()
        net.cut(HERE, "node2")
        error = await error_of(pending, NodeLost, DEADLINE_S)
        assert error.fields["may_have_run"] is True
        await cluster.event("node_dead", "node2")
        # Nobody could tell the host: it has ended its workers by its own clock, and goes on asking.
        await eventually(lambda: len(net["node2"].processes()) < len(running), DEADLINE_S)
        assert await mesh.slice(hosts=0).echo.call_one("still") == "still"
        net.mend(HERE, "node2")
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        after = {name: cluster.incarnation(name) for name in net.hosts}
        assert {name for name in before if after[name] != before[name]} == {"node2"} and after["node2"] > before[
            "node2"
        ]
        await error_of(mesh.slice(hosts=1).echo.call_one(1), PeerFault)
        await mesh.stop(grace_s=0.2)
        again = await cluster.controller.spawn("again", Victim, dims={"hosts": 3, "gpus": 1})
        assert list((await again.echo.call("back")).values) == ["back"] * 3


@pytest.mark.long
async def test_slow_and_lossy_links_cost_time_and_nothing_else(tmp_path, net):
    notes = tmp_path / "notes"
    async with host_cluster(tmp_path / "run", net, timings=PATIENT) as cluster:
        mesh = await cluster.controller.spawn("steady", Victim, dims={"hosts": 3, "gpus": 1})
        lives = {name: cluster.incarnation(name) for name in net.hosts}
        net.spoil("node1", delay_ms=120)
        net.spoil("node2", delay_ms=20, loss_percent=5)
        async with asyncio.timeout(DEADLINE_S):
            for turn in range(3):
                calls = [
                    mesh.slice(hosts=host).note.call_one(str(notes), f"{host}.{turn}.{n}")
                    for host in range(3)
                    for n in range(20)
                ]
                await asyncio.gather(*calls)
        wanted = sorted(f"{host}.{turn}.{n}" for host in range(3) for turn in range(3) for n in range(20))
        assert sorted(notes.read_text().split()) == wanted
        assert not cluster.events("node_dead")
        assert {name: cluster.incarnation(name) for name in net.hosts} == lives


@pytest.mark.long
async def test_a_host_that_loses_power_is_given_up_and_taken_back_when_it_boots(tmp_path, net):
    async with host_cluster(tmp_path / "run", net, timings=LEASES) as cluster:
        mesh = await cluster.controller.spawn("victims", Victim, dims={"hosts": 3, "gpus": 1})
        before = cluster.incarnation("node3")
        pending = mesh.slice(hosts=2).hang.call_one()
        await mesh.pid.call()
        net.take_away("node3")
        await error_of(pending, NodeLost, DEADLINE_S)
        await cluster.event("node_dead", "node3")
        cluster.let_go("node3")
        net.give_back("node3")
        cluster.start_agent("node3")
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        assert cluster.incarnation("node3") > before
        await mesh.stop(grace_s=0.2)
        again = await cluster.controller.spawn("again", Victim, dims={"hosts": 3, "gpus": 1})
        assert list((await again.echo.call("back")).values) == ["back"] * 3
