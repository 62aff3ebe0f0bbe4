"""Who obeys whom: the runtime of a worker takes orders of the controller and its own agent, not of actors."""

import asyncio

import pytest
from support.simulated import SimulatedCluster, simulate
from support.simulated_actors import Probe

from miles_agents.rpc.guard import NotYourOrder
from miles_agents.rpc.mesh import ActorMesh

ORDERS = {"__exit__": ["because I can"], "__close__": [], "__stack__": []}
ORDERS["__construct__"] = [{"module": Probe.__module__, "qualname": "Probe"}, ["intruder"], {}]


def test_an_actor_can_neither_end_nor_rebuild_nor_inspect_another():
    async def story():
        async with SimulatedCluster(2) as cluster:
            victim = await cluster.controller.spawn("victim", Probe)
            others = await cluster.controller.spawn("others", Probe, dims={"hosts": 2})
            for name, args in ORDERS.items():
                for answers in (await others.order.call(victim, name, *args)).values:
                    assert answers == NotYourOrder.code, name
            await asyncio.sleep(5.0)
            assert await victim.greet.call_one("you") == "hello, you"
            assert cluster.events("worker_died") == []

    simulate(story)


def test_a_worker_shows_its_stack_to_its_own_agent_only_and_obeys_the_controller():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            home = cluster.node_of(mesh, 0)
            other = next(node for node in cluster.nodes.values() if node is not home)

            def seen_by(node, name):
                return ActorMesh(mesh._info, mesh.shape, node).endpoint(name)

            assert "thread" in await seen_by(home.agent.node, "__stack__").call_one()
            for node, name in ((other.agent.node, "__stack__"), (home.agent.node, "__close__")):
                with pytest.raises(NotYourOrder, match=name):
                    await seen_by(node, name).call_one()
            assert "thread" in await seen_by(cluster.controller.fabric.node, "__stack__").call_one()

    simulate(story)
