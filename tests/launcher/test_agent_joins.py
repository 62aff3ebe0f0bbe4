"""``miles agent`` as a person starts it, against a real controller."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from support.procs import eventually

from miles_agents.timings import Timings
from miles_controller import Controller, ControllerConfig

CLI = [sys.executable, "-m", "miles_launcher.cli", "agent"]


@pytest.fixture
def agents(tmp_path):
    """Starts ``miles agent``; whatever still runs at the end is ended."""
    started = []

    def start(*flags, stdin=subprocess.DEVNULL):
        process = subprocess.Popen(
            [*CLI, "--run-dir", str(tmp_path), *flags], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=20)


def key_file(tmp_path, line):
    path = tmp_path / "key"
    path.write_text(line + "\n")
    path.chmod(0o600)
    return str(path)


async def output(process):
    out, _ = await asyncio.wait_for(asyncio.to_thread(process.communicate), 30)
    return process.returncode, out.decode()


@pytest.mark.full
async def test_an_agent_with_a_key_file_joins_with_its_inventory_and_leaves_at_the_goodbye(agents, tmp_path):
    async with Controller(ControllerConfig(status=False)) as controller:
        key = key_file(tmp_path, controller.issue_key("node-a"))
        process = agents("--controller", controller.address, "--key-file", key, "--cpu-slots", "3")
        await controller.wait_for_nodes("node-a", timeout_s=30)
        (node,) = controller.fabric.nodes
        assert node.info.devices == (0, 1, 2)
        assert node.info.cores >= 1
        assert node.info.memory_bytes > 0
        assert node.info.hostname
    assert (await output(process))[0] == 0


@pytest.mark.full
async def test_sigterm_ends_an_agent_in_good_order_and_the_controller_knows_at_once(agents, tmp_path):
    async with Controller(ControllerConfig(status=False)) as controller:
        key = key_file(tmp_path, controller.issue_key("node-a"))
        process = agents("--controller", controller.address, "--key-file", key)
        await controller.wait_for_nodes("node-a", timeout_s=30)
        process.send_signal(signal.SIGTERM)
        event = await controller.wait_for_event(lambda e: e.kind == "node_gone", timeout_s=20)
        assert event.subject == "node-a"
        assert (await output(process))[0] == 0


@pytest.mark.full
async def test_a_key_for_another_name_is_told_what_is_wrong(agents, tmp_path):
    async with Controller(ControllerConfig(status=False, nodes=("node-b",))) as controller:
        key = key_file(tmp_path, controller.issue_key("node-a"))
        process = agents("--controller", controller.address, "--key-file", key, "--node", "node-b")
        code, said = await output(process)
        assert code == 2
        assert "E-AGENT-001" in said
        assert "this key was issued for another node than 'node-b'" in said
        assert controller.fabric.find("node-b") is None
        assert controller.fabric.impostors == 1


@pytest.mark.full
async def test_an_agent_that_finds_nobody_says_so_and_ends(agents, tmp_path):
    async with Controller(ControllerConfig(status=False)) as controller:
        line, address = controller.issue_key("node-a"), controller.address
    process = agents("--controller", address, "--key-file", key_file(tmp_path, line), "--join-timeout-s", "1")
    code, said = await output(process)
    assert code == 2
    assert "E-AGENT-002" in said
    assert "so nothing answers there" in said


@pytest.mark.full
async def test_a_key_of_another_run_gets_nowhere_and_hears_why(agents, tmp_path):
    async with (
        Controller(ControllerConfig(status=False)) as controller,
        Controller(ControllerConfig(status=False)) as other,
    ):
        mixed = json.loads(other.issue_key("node-a"))
        mixed["controller_public"] = json.loads(controller.issue_key("node-a"))["controller_public"]
        key = key_file(tmp_path, json.dumps(mixed))
        process = agents("--controller", controller.address, "--key-file", key, "--join-timeout-s", "2")
        code, said = await output(process)
        assert code == 2
        assert "E-AGENT-002" in said
        assert controller.fabric.nodes == []


@pytest.mark.full
async def test_an_agent_whose_starter_goes_while_it_joins_still_joins(agents):
    async with Controller(ControllerConfig(status=False)) as controller:
        read, write = os.pipe()
        process = agents("--controller", controller.address, "--beat-s", "0.2", stdin=read)
        os.close(read)
        os.write(write, controller.issue_key("node-a").encode() + b"\n")
        os.close(write)
        await controller.wait_for_nodes("node-a", timeout_s=30)
        await eventually(lambda: controller.fabric.nodes[0].facts.get("stdin_open") is False)
    assert (await output(process))[0] == 0


@pytest.mark.full
async def test_an_agent_that_nobody_waits_for_any_more_ends_long_before_its_patience(agents):
    async with Controller(ControllerConfig(status=False)) as controller:
        line, address = controller.issue_key("node-a"), controller.address
    read, write = os.pipe()
    process = agents("--controller", address, "--join-timeout-s", "600", stdin=read)
    os.close(read)
    os.write(write, line.encode() + b"\n")
    os.close(write)
    code, said = await output(process)
    assert code == 70
    assert "the launcher went away before the controller was reached" in said


@pytest.mark.full
async def test_the_end_of_stdin_and_of_the_link_end_an_agent_at_once(agents, tmp_path):
    timings = Timings(beat_s=0.2, suspect_s=30.0, fence_s=60.0, dead_s=70.0)
    flags = [f"--{name.replace('_', '-')}={getattr(timings, name)}" for name in timings.__dataclass_fields__]
    controller = Controller(ControllerConfig(status=False, timings=timings))
    async with controller:
        read, write = os.pipe()
        process = agents("--controller", controller.address, *flags, stdin=read)
        os.close(read)
        os.write(write, controller.issue_key("node-a").encode() + b"\n")
        await controller.wait_for_nodes("node-a", timeout_s=30)
        os.close(write)
        # The link is up: an agent does not end because its starter's session did.
        await eventually(lambda: controller.fabric.nodes[0].facts.get("stdin_open") is False)
        assert process.poll() is None
        controller.fabric.link.close()  # the link goes without a goodbye, long before the lease would end
        code, said = await output(process)
        assert code == 70
        assert "stdin was closed and the link is down" in said
        controller.fabric.evidence("node-a", "seen to exit")
