"""How the end of a node is told: by what happened, and in one line with the rest as evidence."""

import asyncio

from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import Probe

from miles_agents.rpc.errors import NodeLost

STORY = "reaper of node-1 exited with code 137; its log ends:\ngoodbye[1]: killed\nthe controller said goodbye"


def test_a_crash_is_a_death_whatever_words_its_log_holds():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("goodbye", Probe, dims={"hosts": 2, "r": 1})
            pending = mesh.slice(hosts=1).wait.call_one(1e5)
            await asyncio.sleep(1.0)
            await cluster.nodes["node-1"].crash()
            cluster.controller.report_node_exit("node-1", STORY)
            error = await outcome(pending)
            _, event = await cluster.event("node_dead", "node-1")
            assert not cluster.events("node_gone")
            assert event.text == "reaper of node-1 exited with code 137; its log ends:"
            assert isinstance(error, NodeLost)
            assert "\n" not in error.what
            assert "goodbye[1]: killed" in error.evidence

    simulate(story)


def test_a_constructor_that_fails_is_named_by_its_own_coordinates():
    async def story():
        async with SimulatedCluster(2) as cluster:
            error = await outcome(
                cluster.controller.spawn("m", Probe, "hello", "one argument too many", dims={"hosts": 2, "r": 1})
            )
            assert isinstance(error, TypeError)
            assert "hosts=" in error.__notes__[-1]

    simulate(story)
