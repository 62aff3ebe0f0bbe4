"""Names become parts of file names: what could leave the directory is refused by the controller, and by the agent."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import Probe

from miles_agents.agent.main import AgentOptions, _Process
from miles_agents.agent.orders import service_spec
from miles_agents.names import BadName, checked_name
from miles_agents.wire.keys import AgentKey, KeyPair
from miles_agents.worker.spec import pack_specs
from miles_controller import Controller, ControllerConfig

BAD = ["", ".", "..", "../x", "/x", "a/b", "a b", "a\n", "-a", ".a", "ä", "a" * 65, "a\0"]


@pytest.mark.parametrize("name", [*BAD, None, 3])
def test_a_bad_name_is_refused_and_the_error_says_what_is_allowed(name):
    with pytest.raises(BadName, match=r"cannot be the name of a mesh") as caught:
        checked_name("mesh", name)
    assert "A-Z a-z 0-9 . _ -" in caught.value.advice


@pytest.mark.parametrize("name", ["a", "trainer", "node-0", "10.0.0.1", "a" * 64, "Qwen3_4B.v2"])
def test_a_good_name_is_taken(name):
    assert checked_name("mesh", name) == name


def test_the_controller_refuses_bad_names_before_anything_is_made():
    async def story():
        async with SimulatedCluster(1) as cluster:
            controller = cluster.controller
            for name in BAD:
                assert isinstance(await outcome(controller.spawn(name, Probe)), BadName), name
                assert isinstance(await outcome(controller.start_service(name, ["x"])), BadName), name
                with pytest.raises(BadName):
                    controller.issue_key(name)
            status = controller.status()
            assert not status["meshes"] and not status["services"] and len(status["nodes"]) == 1

    simulate(story)


@pytest.mark.parametrize("name", ["../x", "a b"])
async def test_nodes_and_runs_of_a_config_are_checked(name):
    with pytest.raises(BadName):
        Controller(ControllerConfig(run_id=name))
    with pytest.raises(BadName):
        await Controller(ControllerConfig(nodes=(name,), status=False)).__aenter__()


def test_an_agent_that_is_told_a_bad_name_refuses_too():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("echo", Probe)
            supervisor = mesh._supervisor
            spec = replace(supervisor._spec(supervisor.ranks[0], {}, 1), mesh=99, mesh_name="../../echo")
            agent = cluster.controller.fabric.agent(cluster.controller.fabric.nodes[0])
            refused = await outcome(agent.endpoint("start_workers").call_one(pack_specs([spec])))
            assert isinstance(refused, BadName)
            assert len(cluster.living) == 1

    simulate(story)
    with pytest.raises(BadName):
        service_spec({"name": "../x", "argv": ["x"]}, Path("logs"), {})


@pytest.mark.parametrize("node", ["../x", "/x"])
def test_an_agent_process_under_a_bad_name_does_not_start(node):
    server, own = KeyPair.generate(), KeyPair.generate()
    with pytest.raises(BadName):
        _Process(AgentOptions("tcp://127.0.0.1:1", node=node), AgentKey("run", "node-0", server.public, own))
    with pytest.raises(BadName):
        _Process(AgentOptions("tcp://127.0.0.1:1"), AgentKey("run", node, server.public, own))
