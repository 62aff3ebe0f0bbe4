"""A cluster whose links and agents fail: sessions that go on, nodes that fence themselves. Virtual time."""

import asyncio

import pytest
from support.simulated import CONTROLLER, SimulatedCluster, outcome, simulate
from support.simulated_actors import EXECUTED, Probe

from miles_agents.rpc.errors import ControllerLost, NodeLost
from miles_agents.timings import Timings
from miles_agents.wire.memory_transport import Faults
from miles_controller import Policy

EIGHT = {"hosts": 2, "gpus": 4}
TIMINGS = Timings()


@pytest.fixture(autouse=True)
def nothing_executed():
    EXECUTED.clear()


# -- partitions ------------------------------------------------------------------------------------------------


def test_three_seconds_of_partition_lose_nothing_and_repeat_nothing():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            calls = {}

            async def call_all_along():
                for number in range(60):
                    for rank in range(8):
                        call = mesh.slice(hosts=rank // 4, gpus=rank % 4).count.call_one(f"{rank}/{number}")
                        calls[f"{rank}/{number}"] = call
                    await asyncio.sleep(0.1)

            calling = asyncio.create_task(call_all_along())
            await asyncio.sleep(1.0)
            cluster.partition("node-1")
            await asyncio.sleep(3.0)
            cluster.heal("node-1")
            await calling
            assert [await call for call in calls.values()] == [1] * 480
            assert set(EXECUTED) == set(calls)
            assert set(EXECUTED.values()) == {1}
            assert cluster.events("node_dead") == []

    simulate(story)


def test_a_connection_that_breaks_ten_times_loses_nothing_and_repeats_nothing():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            calls = []
            for round_number in range(10):
                calls += [mesh.count.call(f"{round_number}/{number}") for number in range(20)]
                await asyncio.sleep(0.0003)
                for name in cluster.names:
                    for connection in cluster.network.connections(name, CONTROLLER):
                        cluster.network.cut(connection)
                await asyncio.sleep(1.0)
            for call in calls:
                await call
            assert len(EXECUTED) == 200
            assert set(EXECUTED.values()) == {8}

    simulate(story)


@pytest.mark.parametrize("towards", [None, "controller", "node"])
def test_a_partition_of_a_minute_fences_the_node_before_the_controller_gives_its_ranks_away(towards):
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            caller = await cluster.controller.spawn("caller", Probe)
            assert cluster.node_of(caller, 0) is cluster.nodes["node-0"]
            workers = cluster.nodes["node-1"].starter.living
            assert len(workers) == 4
            pending = mesh.slice(hosts=1).wait.call(25.0)
            worker_pending = caller.endpoint("wait_for").call_one(mesh.slice(hosts=1, gpus=0), 25.0)
            await asyncio.sleep(0.5)
            cut_at = cluster.now
            cluster.partition("node-1", towards=towards)
            dead_at, _ = await cluster.event("node_dead", "node-1")
            for worker in workers:
                assert worker.gone_at is not None
                assert worker.gone_at < dead_at
                assert worker.gone_at - cut_at <= TIMINGS.fence_s
            # Where the node is still heard, the count begins when the transport gives the silent connection up.
            heard_s = cluster.network.silence_s if towards == "node" else 0.0
            assert TIMINGS.fence_s < dead_at - cut_at <= heard_s + TIMINGS.dead_s + TIMINGS.beat_s
            for call in (pending, worker_pending):
                assert isinstance(await outcome(call), NodeLost)
            assert isinstance(await outcome(mesh.slice(hosts=1, gpus=0).who.call_one()), NodeLost)
            assert len(await mesh.slice(hosts=0).who.call()) == 4
            await asyncio.sleep(60.0 - (cluster.now - cut_at))
            first = cluster.nodes["node-1"].lives[0].agent.incarnation
            cluster.heal("node-1")
            await cluster.controller.wait_for_nodes()
            assert cluster.controller.fabric.find("node-1").incarnation > first
            await mesh.stop()
            again = await cluster.controller.spawn("again", Probe, dims=EIGHT)
            assert len(await again.who.call()) == 8

    simulate(story)


def test_a_node_fences_when_its_lease_is_over_and_not_with_the_next_beat():
    async def story():
        timings = Timings(beat_s=4.0, suspect_s=5.0, fence_s=9.0, dead_s=9.5)
        async with SimulatedCluster(1, timings=timings) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            worker = cluster.worker(mesh, 0)
            cluster.partition("node-0")
            dead_at, _ = await cluster.event("node_dead")
            assert worker.gone_at < dead_at
            assert worker.gone_at == pytest.approx(cluster.nodes["node-0"].lives[0].began_at + 9.0, abs=0.1)

    simulate(story)


def test_a_node_whose_partition_ends_between_fence_and_death_joins_again_at_once():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT, policy=Policy(on_death="restart"))
            cluster.partition("node-1")
            await asyncio.sleep(17.0)
            cluster.heal("node-1")
            healed_at = cluster.now
            await cluster.until(lambda: len(cluster.events("worker_restarted")) == 4)
            assert cluster.now - healed_at < 10.0
            assert len(await mesh.who.call()) == 8
            assert len(cluster.living) == 8

    simulate(story)


def test_what_a_node_says_after_it_was_declared_dead_is_ignored():
    """The agent is frozen, so that its old life still has answers to send when its ranks live elsewhere."""

    async def story():
        async with SimulatedCluster(3, cpu_slots=2) as cluster:
            policy = Policy(on_death="restart", backoff_s=0.1)
            mesh = await cluster.controller.spawn("m", Probe, dims={"ranks": 2}, policy=policy)
            node = cluster.node_of(mesh, 1)
            pending = mesh.wait.call(18.0)
            await asyncio.sleep(0.5)
            node.freeze()
            assert isinstance(await outcome(pending), NodeLost)
            await cluster.until(lambda: len(cluster.events("worker_restarted")) == 2)
            late = cluster.controller.fabric.node.calls.stats.late
            again = mesh.wait.call(5.0)
            node.thaw()
            answers = (await again).values
            assert list(answers) == [mesh._info.incarnations[rank] for rank in range(2)]
            await asyncio.sleep(30.0)
            assert cluster.controller.fabric.node.calls.stats.late == late
            assert len(cluster.living) == 2
            assert len(cluster.controller.fabric.nodes) == 3

    simulate(story)


# -- deaths of agents and controllers --------------------------------------------------------------------------


@pytest.mark.parametrize("is_reported", [True, False])
def test_an_agent_that_dies_fails_the_calls_on_its_node(is_reported):
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            pending = mesh.slice(hosts=1).wait.call(1000.0)
            await asyncio.sleep(0.5)
            died_at = cluster.now
            await cluster.nodes["node-1"].crash()
            if is_reported:
                cluster.controller.report_node_exit("node-1", "its reaper ended with code 137")
            error = await outcome(pending)
            assert isinstance(error, NodeLost)
            if is_reported:
                assert "code 137" in str(error)
                assert cluster.now - died_at < 0.01
            else:
                assert TIMINGS.dead_s - TIMINGS.beat_s <= cluster.now - died_at <= TIMINGS.dead_s + TIMINGS.beat_s
            cluster.nodes["node-1"].start()
            await cluster.controller.wait_for_nodes()

    simulate(story)


def test_ranks_of_a_dead_node_come_back_on_a_spare_one():
    async def story():
        async with SimulatedCluster(3, cpu_slots=4) as cluster:
            policy = Policy(on_death="restart")
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT, policy=policy)
            lost = cluster.node_of(mesh, 4)
            await lost.crash()
            cluster.controller.report_node_exit(lost.info.node, "gone")
            await cluster.until(lambda: len(cluster.events("worker_restarted")) == 4)
            where = {node for node, _, _ in (await mesh.who.call()).values}
            assert len(where) == 2
            assert lost.info.node not in where

    simulate(story)


def test_agents_fence_and_end_their_workers_when_the_controller_vanishes():
    async def story():
        cluster = SimulatedCluster(2)
        async with cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            caller = mesh.slice(hosts=0, gpus=0).endpoint("outlive").call_one(mesh.slice(hosts=1, gpus=0))
            await asyncio.sleep(0.5)
            workers = cluster.living
            vanished_at = cluster.now
            cluster.controller.fabric.link.close()
            await asyncio.sleep(TIMINGS.fence_s + TIMINGS.beat_s)
            assert cluster.living == []
            for worker in workers:
                assert TIMINGS.fence_s - 2 * TIMINGS.beat_s < worker.gone_at - vanished_at <= TIMINGS.fence_s
            assert not caller.done()
        for node in cluster.nodes.values():
            assert not node.lives[0].over.orderly
        assert isinstance(await outcome(caller), (ControllerLost, NodeLost))

    simulate(story)


def test_workers_fence_themselves_when_their_agent_is_frozen():
    async def story():
        async with SimulatedCluster(1) as cluster:
            await cluster.controller.spawn("m", Probe, dims={"ranks": 3})
            workers = cluster.living
            frozen_at = cluster.now
            cluster.nodes["node-0"].freeze()
            await asyncio.sleep(TIMINGS.fence_s + 0.001)
            for worker in workers:
                assert worker.gone_at is not None
                assert worker.gone_at - frozen_at <= TIMINGS.fence_s
            cluster.nodes["node-0"].thaw()
            await cluster.event("node_dead")
            await cluster.controller.wait_for_nodes()
            await cluster.controller.spawn("again", Probe, dims={"ranks": 3})

    simulate(story)


def test_a_worker_whose_start_is_under_way_when_the_agent_fences_is_never_started():
    async def story():
        async with SimulatedCluster(1) as cluster:
            node = cluster.nodes["node-0"]
            node.starter.start_s = 30.0
            spawning = asyncio.create_task(outcome(cluster.controller.spawn("m", Probe)))
            await asyncio.sleep(1.0)
            cluster.partition("node-0")
            await asyncio.sleep(60.0)
            assert node.starter.started == []  # it was broken off, not waited for
            assert isinstance(await spawning, NodeLost)
            cluster.heal("node-0")
            await cluster.controller.wait_for_nodes()

    simulate(story)


def test_a_spawn_that_is_given_up_leaves_nothing_behind():
    async def story():
        for start_s, patience_s in ((5.0, 1.0), (0.01, 0.0105), (0.01, 0.0115)):
            async with SimulatedCluster(1) as cluster:
                cluster.nodes["node-0"].starter.start_s = start_s
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(cluster.controller.spawn("m", Probe, dims={"ranks": 3}), patience_s)
                assert cluster.controller.find_mesh("m") is None
                await asyncio.sleep(10.0)
                assert cluster.living == []
                await cluster.controller.spawn("m", Probe)

    simulate(story)


def test_an_agent_that_was_dismissed_starts_nothing_more():
    async def story():
        async with SimulatedCluster(1) as cluster:
            node = cluster.nodes["node-0"]
            mesh = await cluster.controller.spawn("m", Probe, dims={"ranks": 2}, term_grace_s=3.0)
            cluster.worker(mesh, 0).freeze()  # it takes all of its grace to end
            dismissing = asyncio.create_task(cluster.controller.dismiss("node-0", reason="enough"))
            await asyncio.sleep(1.0)
            error = await outcome(cluster.controller.spawn("late", Probe))
            assert isinstance(error, ControllerLost), error
            await dismissing
            await node.wait_ended()
            assert [worker.spec.mesh_name for worker in node.starter.started] == ["m", "m"]

    simulate(story)


# -- bad links -------------------------------------------------------------------------------------------------

BAD = {
    "drop": Faults(drop=0.2),
    "duplicate": Faults(duplicate=0.2),
    "reorder": Faults(reorder=0.2, reorder_s=0.05),
    "delay": Faults(delay_s=(0.0, 0.2)),
    "all": Faults(drop=0.1, duplicate=0.1, reorder=0.1, reorder_s=0.05, delay_s=(0.0, 0.05)),
}


@pytest.mark.parametrize("kind", BAD)
def test_on_bad_links_every_call_arrives_once_and_in_order(kind):
    async def story():
        # Beats that get lost must not fence anybody here: it is the sessions that are tested.
        timings = Timings(fence_s=60.0, dead_s=80.0)
        async with SimulatedCluster(2, seed=7, timings=timings, leave_timeout_s=200.0) as cluster:
            senders = await cluster.controller.spawn("senders", Probe, dims={"hosts": 2, "gpus": 1})
            receivers = await cluster.controller.spawn("receivers", Probe, dims={"hosts": 2, "gpus": 1})
            cluster.disturb(BAD[kind])
            cluster.disturb_workers(BAD[kind])
            assert list((await senders.send_numbers.call(receivers, 500)).values) == [500, 500]
            for _, seen in (await receivers.noted.call()).items():
                assert seen == {"senders[0]": list(range(500)), "senders[1]": list(range(500))}
            cluster.disturb_workers(Faults())
            await receivers.stop()

    simulate(story)


def test_nodes_join_and_meshes_start_on_links_that_lose_every_fifth_message():
    async def story():
        for seed in range(5):
            async with SimulatedCluster(3, seed=seed, join=False, leave_timeout_s=60.0) as cluster:
                cluster.disturb(BAD["drop"])
                for node in cluster.nodes.values():
                    node.start()
                await cluster.controller.wait_for_nodes()
                mesh = await cluster.controller.spawn("m", Probe, dims={"ranks": 6})
                assert len(await mesh.who.call()) == 6
                await mesh.stop()
                assert cluster.living == []

    simulate(story)
