"""The controller's process dies or is interrupted: agents, workers and what these started vanish."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from support.cluster import kill
from support.leaks import runtime_directories
from support.process_cases import alive as still_alive
from support.process_cases import reported
from support.procs import alive, eventually_sync, process_identity

from miles_agents.runtime_dir import runtime_dir

SCRIPT = """
import asyncio, json, os, sys
from pathlib import Path

from miles_agents.timings import Timings
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents
from support.actors import Victim
{imports}

async def main():
    run_dir = Path(sys.argv[1])
    timings = Timings(beat_s=0.2, suspect_s=1.0, fence_s=3.0, dead_s=4.0)
    config = ControllerConfig(nodes=("node-0", "node-1"), run_dir=run_dir, timings=timings)
    async with Controller(config) as controller:
        async with LocalAgents(controller, config.nodes, run_dir=run_dir, cpu_slots=2, timings=timings) as agents:
            await controller.wait_for_nodes()
            mesh = await controller.spawn("story", Victim, "evader", str(run_dir / "evaders"), dims={{"hosts": 2}})
            pids = [agent.pid for agent in agents.agents.values()]
            pids += list((await mesh.pid.call()).values)
            hanging = mesh.hang.call()
            await mesh.pid.call()
            (run_dir / "story.new").write_text(json.dumps(pids))
            (run_dir / "story.new").rename(run_dir / "story.json")
            await hanging

if __name__ == "__main__":
    {run}
"""
RUNNERS = {
    "asyncio": {"imports": "", "run": "asyncio.run(main())"},
    "uvloop": {"imports": "import uvloop", "run": "uvloop.run(main())"},
}


@contextmanager
def controller_script(tmp_path, runner="asyncio", **options):
    """A script that runs the whole thing; yields its process and everything below it."""
    before = set(runtime_directories())  # an engine of the session may have one
    script = tmp_path / "story.py"
    script.write_text(SCRIPT.format(**RUNNERS[runner]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)], env=env, stdout=out, stderr=out, **options
        )
    try:
        eventually_sync((tmp_path / "story.json").exists, 40.0, what="the script's mesh is up")
        eventually_sync(lambda: len(reported(tmp_path / "evaders", "evader")) == 4, 20.0)
        named = [process_identity(pid) for pid in json.loads((tmp_path / "story.json").read_text())]
        assert all(map(alive, named))
        yield process, named
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        with runtime_dir("the-next-run"):  # which removes the directories of those that were killed
            left = [path for path in runtime_directories() if path not in before]
    assert len(left) == 1 and left[0].endswith("the-next-run")


def everything_vanishes(tmp_path, named):
    eventually_sync(lambda: not any(map(alive, named)), 30.0, what="agents and workers end")
    eventually_sync(lambda: still_alive(reported(tmp_path / "evaders")) == [], 30.0, what="grandchildren end")


@pytest.mark.full
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_killed_controller_leaves_no_agent_worker_or_grandchild(tmp_path, runner, took):
    with controller_script(tmp_path, runner) as (process, named):
        at = kill(process.pid)
        process.wait()
        everything_vanishes(tmp_path, named)
        took("kill to clean", at)
    log = (tmp_path / "logs" / "agent-node-0.log").read_text()
    assert "stdin" in log or "launcher" in log, log


@pytest.mark.full
@pytest.mark.parametrize("runner", RUNNERS)
def test_an_interrupted_script_ends_everything_in_order(tmp_path, runner, took):
    with controller_script(tmp_path, runner) as (process, named):
        at = kill(process.pid, signal.SIGINT)
        code = process.wait(60)
        took("interrupt to exit", at)
        assert not any(map(alive, named)), "the script ended before what it had started"
        assert still_alive(reported(tmp_path / "evaders")) == []
    assert code == -signal.SIGINT, (tmp_path / "out").read_text()
    assert "KeyboardInterrupt" in (tmp_path / "out").read_text()
    log = (tmp_path / "logs" / "agent-node-0.log").read_text()
    assert "goodbye" in log


@pytest.mark.full
def test_ctrl_c_to_the_whole_terminal_group_ends_everything_in_order(tmp_path):
    with controller_script(tmp_path, start_new_session=True) as (process, named):
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
        assert not any(map(alive, named))
        assert still_alive(reported(tmp_path / "evaders")) == []
    assert code == -signal.SIGINT
    assert "reaper died" not in (tmp_path / "logs" / "agent-node-0.log").read_text()


@pytest.mark.full
def test_an_impatient_second_interrupt_leaves_nothing_either(tmp_path):
    with controller_script(tmp_path) as (process, named):
        kill(process.pid, signal.SIGINT)
        kill(process.pid, signal.SIGINT)
        process.wait(60)
        everything_vanishes(tmp_path, named)


@pytest.mark.full
def test_a_stopped_controller_is_outlived_by_nobody_and_the_agents_fence(tmp_path, took):
    with controller_script(tmp_path) as (process, named):
        at = kill(process.pid, signal.SIGSTOP)
        workers = named[2:]
        eventually_sync(lambda: not any(map(alive, workers)), 30.0, what="the workers are fenced")
        eventually_sync(lambda: still_alive(reported(tmp_path / "evaders")) == [], 30.0, what="grandchildren end")
        took("stop to fenced", at)
        kill(process.pid, signal.SIGCONT)
        process.wait(60)  # its call ends with the loss of a node
        everything_vanishes(tmp_path, named)
    assert "NodeLost" in (tmp_path / "out").read_text() or "WorkerDied" in (tmp_path / "out").read_text()
