import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest
from support.procs import alive, eventually, process_identity

from miles_agents.agent.reaper import EXIT_NOT_CLEAN
from miles_agents.timings import Timings
from miles_launcher.local import AgentWouldNotStop, CannotStartAgent, LocalAgents


class Controller:
    """Gives out keys and writes down what it is told."""

    local_address = "tcp://127.0.0.1:7100"

    def __init__(self):
        self.exits = {}
        self.reapers = {}

    def issue_key(self, node):
        return f'{{"node":"{node}"}}'

    def report_node_exit(self, node, evidence, *, reaper):
        assert node not in self.exits
        self.reapers[node] = reaper
        self.exits[node] = evidence

    async def dismiss(self, *nodes, reason):
        self.dismissed = nodes


@pytest.fixture
def controller():
    return Controller()


@pytest.fixture
def agents(controller, fake_agent, tmp_path):
    def new(nodes, mode="obey", **options):
        env = {**fake_agent, "FAKE_MODE": mode, "FAKE_REPORT": str(tmp_path / "{}.json")}
        return LocalAgents(controller, nodes, run_dir=tmp_path / "run", env=env, **options)

    return new


async def test_each_node_gets_an_agent_with_its_key_and_flags(agents, controller, report, tmp_path):
    timings = Timings(beat_s=0.1, suspect_s=0.2, fence_s=0.3, dead_s=0.4)
    async with agents(["node-0", "node-1"], cpu_slots=3, timings=timings) as started:
        for node in ("node-0", "node-1"):
            await eventually(lambda: report(f"{node}.json"))  # noqa: B023  # waited for at once
            told = report(f"{node}.json")
            assert told["key"] == f'{{"node":"{node}"}}\n'
            given = dict(zip(told["argv"][::2], told["argv"][1::2], strict=True))
            assert given == {
                "--node": node,
                "--controller": controller.local_address,
                "--run-dir": str(tmp_path / "run"),
                "--cpu-slots": "3",
                "--beat-s": "0.1",
                "--suspect-s": "0.2",
                "--fence-s": "0.3",
                "--dead-s": "0.4",
                "--also-import": "miles_controller.controller,miles_launcher.local",
            }
            assert told["ppid"] == started.agents[node].pid
        assert controller.exits == {}
    assert sorted(controller.exits) == ["node-0", "node-1"]
    assert controller.reapers == {node: agent.pid for node, agent in started.agents.items()}
    assert "exited with code 0" in controller.exits["node-0"]
    assert [agent.exited.result() for agent in started.agents.values()] == [0, 0]


async def test_an_agent_that_fails_is_reported_with_its_exit_code_and_last_lines(agents, controller):
    async with agents(["node-0"], mode="fail") as started:
        assert await asyncio.wait_for(asyncio.shield(started.agents["node-0"].exited), 30) == 1
        assert "exited with code 1" in controller.exits["node-0"]
        assert "fake agent: no such device" in controller.exits["node-0"]
        assert str(started.agents["node-0"].log_path) in controller.exits["node-0"]
    assert len(controller.exits) == 1


async def test_an_agent_that_ignores_everything_is_killed_and_the_reaper_still_vouches(agents, controller, report):
    async with agents(["node-0"], mode="stubborn", grace_s=0.3) as started:
        await eventually(lambda: report("node-0.json"))
        agent = process_identity(report("node-0.json")["pid"])
    assert not alive(agent)
    assert started.agents["node-0"].exited.result() == 128 + signal.SIGKILL
    assert "exited with code 137" in controller.exits["node-0"]


async def test_a_stopped_reaper_is_woken_to_clean_up(agents, controller, report):
    async with agents(["node-0"], mode="stubborn", grace_s=0.3) as started:
        await eventually(lambda: report("node-0.json"))
        agent = process_identity(report("node-0.json")["pid"])
        os.kill(started.agents["node-0"].pid, signal.SIGSTOP)
    assert not alive(agent)
    assert "node-0" in controller.exits


async def test_a_reaper_that_says_that_the_node_is_not_clean_proves_nothing(agents, controller, caplog):
    async with agents(["node-0"], mode="98") as started:
        assert await asyncio.wait_for(asyncio.shield(started.agents["node-0"].exited), 30) == EXIT_NOT_CLEAN == 98
    assert controller.exits == {}
    assert "no proof that the node is clean" in caplog.text


async def test_a_killed_reaper_proves_nothing(agents, controller, report, caplog):
    async with agents(["node-0"]) as started:
        await eventually(lambda: report("node-0.json"))
        agent = process_identity(report("node-0.json")["pid"])
        os.kill(started.agents["node-0"].pid, signal.SIGKILL)
        assert await asyncio.wait_for(asyncio.shield(started.agents["node-0"].exited), 30) == -signal.SIGKILL
        await eventually(lambda: not alive(agent))
    assert controller.exits == {}
    assert "killed by SIGKILL" in caplog.text


DEAF_REAPER = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(sys.argv[2:], close_fds=False)
while True:
    time.sleep(100)
"""


async def test_a_reaper_that_does_not_end_is_killed_with_all_below_it_and_an_error_says_so(
    agents, controller, report, tmp_path
):
    reaper = tmp_path / "path" / "miles_agents" / "agent" / "reaper.py"
    reaper.unlink()
    reaper.write_text(DEAF_REAPER)
    started = agents(["node-0"], mode="stubborn", grace_s=0.2)
    await started.__aenter__()
    await eventually(lambda: report("node-0.json"))
    family = [process_identity(report("node-0.json")["pid"]), process_identity(started.agents["node-0"].pid)]
    with pytest.raises(AgentWouldNotStop, match="node-0: pid"):
        await started.__aexit__(None)
    await eventually(lambda: not any(map(alive, family)))
    assert controller.exits == {}


async def test_if_one_agent_cannot_start_those_before_it_are_stopped(agents, controller, tmp_path):
    (tmp_path / "run" / "logs" / "agent-node-1.log").mkdir(parents=True)
    with pytest.raises(CannotStartAgent, match=r"agent-node-1\.log"):
        async with agents(["node-0", "node-1"]):
            pytest.fail("was entered")
    assert list(controller.exits) == ["node-0"]


async def test_logs_are_private(agents):
    before = os.umask(0)
    try:
        async with agents(["node-0"]) as started:
            assert started.agents["node-0"].log_path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


STARTER = """
import asyncio, os, sys
from pathlib import Path
from miles_launcher.local import LocalAgents

class Controller:
    local_address = "tcp://127.0.0.1:7100"
    def issue_key(self, node): return "{}"
    def report_node_exit(self, node, evidence, *, reaper): pass
    async def dismiss(self, *nodes, reason): pass

async def main():
    async with LocalAgents(Controller(), ["node-0"], run_dir=Path(sys.argv[1])):
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_when_the_starter_is_killed_the_agents_end(fake_agent, report, tmp_path):
    command = [sys.executable, "-c", STARTER, str(tmp_path / "run")]
    starter = subprocess.Popen(command, env=fake_agent)  # noqa: ASYNC220
    try:
        await eventually(report)
        family = [process_identity(child.pid) for child in psutil.Process(starter.pid).children(recursive=True)]
        assert len(family) == 2
    finally:
        starter.kill()
        starter.wait()
    await eventually(lambda: not any(map(alive, family)))
