"""What the controller believes of agents: their descriptions, their claims about earlier lives. Virtual time."""

import asyncio
import dataclasses
import logging

import pytest
from support.simulated import SimulatedCluster, simulate
from support.simulated_actors import Probe

from miles_agents.node_info import BadNodeInfo, Gpu, NodeInfo
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.shape import Shape
from miles_agents.simulation import simulated_info
from miles_agents.wire.envelope import CONTROLLER_MESH
from miles_agents.wire.keys import AgentKey
from miles_agents.wire.link_handlers import Refusal


def test_a_stolen_key_does_not_end_the_living_node():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"hosts": 2, "r": 1})
            living = cluster.controller.fabric.find("node-0")
            thief = cluster.make_node("node-0", process="-thief", join_timeout_s=8.0)
            thief.start()
            thief._fenced = [living.incarnation, 1, 0, -1, "1", None]
            await asyncio.sleep(5.0)
            assert cluster.controller.fabric.find("node-0") is living
            assert not cluster.events("node_dead")
            assert await mesh.slice(hosts=0).greet.call_one("x") == "hello, x"

    simulate(story)


def test_a_node_that_fenced_itself_is_believed_at_once():
    async def story():
        async with SimulatedCluster(1) as cluster:
            began, timings = cluster.now, cluster.timings
            first = cluster.controller.fabric.find("node-0")
            cluster.partition("node-0", towards="node")  # its beats arrive, their answers do not
            await asyncio.sleep(timings.fence_s + 1.0)
            cluster.heal("node-0")
            at, event = await cluster.event("node_dead", "node-0")
            assert at - began < timings.dead_s
            assert "fenced itself" in event.text
            await cluster.until(lambda: cluster.controller.fabric.find("node-0") not in (None, first))

    simulate(story)


def test_a_claim_with_the_session_of_the_life_is_believed():
    async def story():
        async with SimulatedCluster(1) as cluster:
            fabric, node = cluster.controller.fabric, cluster.nodes["node-0"]
            session = node.agent.session_id
            public = AgentKey.from_line(cluster.controller.issue_key("node-0")).own.public
            hello = {"node": "node-0", "info": node.info.to_plain(), "fenced": [session]}
            assert not isinstance(fabric.admit(hello, public, 77), Refusal)
            assert [event.text for _, event in cluster.events("node_dead")] == []  # told with the next turn of the loop
            _, event = await cluster.event("node_dead", "node-0")
            assert "fenced itself" in event.text

    simulate(story)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", "node-0"),
        ("cpu_slots", 4097),
        ("cpu_slots", 2**62),
        ("addresses", ["10.0.0.1"] * 65),
        ("addresses", ["1" * 257]),
        ("hostname", "h" * 257),
        ("cores", -1),
        ("memory_bytes", 2**63),
        ("gpus", [Gpu(index, str(index), "H100", 1).to_plain() for index in range(65)]),
        ("gpus", [Gpu(2**40, "u", "H100", 1).to_plain()]),
    ],
)
def test_an_absurd_description_is_refused_by_field(field, value):
    async def story():
        async with SimulatedCluster(1) as cluster:
            public = AgentKey.from_line(cluster.controller.issue_key("node-x")).own.public
            info = {**simulated_info("node-x").to_plain(), field: value}
            verdict = cluster.controller.fabric.admit({"node": "node-x", "info": info}, public, 77)
            assert isinstance(verdict, Refusal)
            assert repr("index" if value and field == "gpus" and len(value) == 1 else field) in verdict.reason
            assert len(verdict.reason) < 600
            assert cluster.controller.fabric.find("node-x") is None

    simulate(story)


def test_the_largest_description_is_accepted():
    cards = tuple(Gpu(index, "u" * 256, "H100", 2**40) for index in range(64))
    info = dataclasses.replace(simulated_info("n" * 256, cpu_slots=4096), gpus=cards, addresses=("a" * 256,) * 64)
    assert NodeInfo.from_plain(info.to_plain()) == info
    with pytest.raises(BadNodeInfo, match="'node'"):
        NodeInfo.from_plain(dataclasses.replace(info, node="n" * 257).to_plain())


def test_no_two_lives_of_anything_have_the_same_incarnation():
    async def story():
        async with SimulatedCluster(3) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"r": 8})
            fabric = cluster.controller.fabric
            given = [fabric.node.address.incarnation, *(node.incarnation for node in fabric.nodes)]
            given += [rank.incarnation for rank in mesh._supervisor.ranks]
            assert len(set(given)) == 1 + 3 + 8

    simulate(story)


def test_log_lines_are_taken_from_the_agent_of_their_node_only(caplog):
    caplog.set_level(logging.INFO, "miles.remote")

    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            own = cluster.controller.fabric.node
            handle = MeshInfo(CONTROLLER_MESH, "controller", {0: own.address.incarnation})

            async def say(speaker, node, source, text):
                controller = ActorMesh(handle, Shape.of(controller=1), speaker)
                await controller.endpoint("take_logs").call_one(node, [[source, 1.0, text, []]])

            agents = [cluster.nodes[name].agent.node for name in cluster.names]
            await say(agents[0], "node-0", "m[0]@node-0", "mine\x1b[2J")
            await say(agents[1], "node-0", "m[0]@node-0", "in another's name")
            await say(agents[1], "node-1", "m[0]@node-0", "of another's process")
            await say(cluster.worker(mesh, 0).runtime.node, "node-0", "m[0]@node-0", "of a worker")
            await say(own, "node-0", "m[0]@node-0", "of nobody")

    simulate(story)
    assert [record.getMessage() for record in caplog.records if record.name == "miles.remote"] == ["m[0]@node-0 | mine"]
