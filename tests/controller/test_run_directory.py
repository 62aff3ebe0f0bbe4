"""Where a run writes its files: what cannot be used is said in four parts, by the controller and by the agent."""

import json
from pathlib import Path

import pytest
from support.simulated import SimulatedCluster, simulate

from miles_agents.agent.main import AgentOptions, _Process
from miles_agents.agent.process_launch import CannotStart
from miles_agents.agent.starter import _working_directory
from miles_agents.rpc.shape import Shape
from miles_agents.run_files import UnusableRunDirectory, usable_directory
from miles_agents.wire.keys import AgentKey, KeyPair
from miles_agents.worker.spec import WorkerSpec
from miles_controller import Controller, ControllerConfig
from miles_controller.services import NoSuchNode


@pytest.fixture(params=["below a file", "not writable"])
def unusable(request, tmp_path):
    if request.param == "not writable":
        return Path("/proc/runs")
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


@pytest.fixture
def no_working_directory(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()


def _agent(run_dir):
    key = AgentKey("run", "node-0", KeyPair.generate().public, KeyPair.generate())
    return _Process(AgentOptions("tcp://127.0.0.1:1", run_dir=run_dir), key)


def test_a_directory_is_made_and_left_empty(tmp_path):
    made = usable_directory(tmp_path / "a" / "b")
    assert made == tmp_path / "a" / "b" and not list(made.iterdir())


async def test_the_controller_says_that_its_run_directory_is_unusable(unusable):
    with pytest.raises(UnusableRunDirectory) as caught:
        await Controller(ControllerConfig(run_dir=unusable, status=False)).__aenter__()
    assert str(unusable) in caught.value.what and caught.value.evidence and caught.value.advice


async def test_the_controller_says_that_it_cannot_open_its_events(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(UnusableRunDirectory, match=r"events\.jsonl"):
        await Controller(ControllerConfig(run_dir=tmp_path, status=False)).__aenter__()


def test_an_agent_says_that_its_run_directory_is_unusable(unusable):
    with pytest.raises(UnusableRunDirectory, match="logs/node-0"):
        _agent(str(unusable))._make_log_dir()


def test_without_a_working_directory_an_agent_says_so(no_working_directory):
    with pytest.raises(UnusableRunDirectory, match="No such file") as caught:
        _agent(None)._make_log_dir()
    assert "the working directory cannot be used" in caught.value.evidence
    spec = WorkerSpec("run", 7, "trainer", 0, 8, 9, Shape.of(ranks=1))
    with pytest.raises(CannotStart, match=r"trainer\[0\]: the agent's working directory is gone"):
        _working_directory(spec)


def test_events_are_written_where_they_should_be(tmp_path):
    async def story():
        async with SimulatedCluster(1, run_dir=tmp_path / "run"):
            pass

    simulate(story)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert "node_joined" in {json.loads(line)["kind"] for line in lines}


def test_nobody_waits_for_a_node_that_the_run_does_not_expect():
    async def story():
        async with SimulatedCluster(2) as cluster:
            with pytest.raises(NoSuchNode, match="'node-7'") as caught:
                await cluster.controller.wait_for_nodes("node-0", "node-7")
            assert "node-0, node-1" in caught.value.evidence

    simulate(story)
