"""Large messages between nodes on links that take half a minute for them. Virtual time."""

import asyncio

from support.simulated import CONTROLLER, SimulatedCluster, simulate
from support.simulated_actors import Probe

from miles_agents.timings import Timings
from miles_agents.wire.memory_transport import Faults
from miles_agents.wire.session import NETWORK

RATE = 2_000_000
SIZE = 44_000_000
SLOW = Faults(bytes_per_s=RATE)


def test_a_message_that_takes_longer_than_a_lease_neither_fences_nor_alarms():
    assert Timings().dead_s < SIZE / RATE

    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            cluster.disturb(SLOW)
            began = cluster.now
            back = await mesh.note.call_one("sender", bytes(SIZE))
            assert len(back) == SIZE
            assert cluster.now - began > 2 * SIZE / RATE, "it went over the slow link, there and back"
            assert {event.kind for _, event in cluster.told} == {"node_joined", "mesh_started"}

    simulate(story)


def test_a_connection_that_breaks_costs_what_was_under_way_and_not_the_message():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            cluster.disturb(SLOW)
            sent = cluster.controller.fabric.link.transport.stats
            before = sent.sent_bytes
            calling = asyncio.ensure_future(mesh.note.broadcast("sender", bytes(SIZE)))
            for _ in range(3):
                await asyncio.sleep(6.0)
                (connection,) = cluster.network.connections("node-0", CONTROLLER)
                assert cluster.network.cut(connection)
            await calling
            assert [len(number) for number in (await mesh.noted.call_one())["sender"]] == [SIZE]
            assert sent.sent_bytes - before < SIZE + 4 * NETWORK.window_bytes
            assert cluster.events("node_dead") == []

    simulate(story)
