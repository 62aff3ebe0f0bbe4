"""--launcher external: key files, the commands that are printed, who is missing, and a document that can be used."""

import asyncio
import configparser
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.procs import eventually

from miles_controller import Controller, ControllerConfig
from miles_controller.controller import NodesMissing
from miles_launcher.cli import _parser
from miles_launcher.external import CannotWriteKeys, ExternalAgents

DOC = Path(__file__).parents[2] / "docs" / "clusters.md"
MILES = Path(sys.executable).parent / "miles"


def external(controller, names, run_dir, said, **more):
    return ExternalAgents(controller, names, run_dir=run_dir, say=said.append, **{"timeout_s": 60.0, **more})


def by_hand(command, tmp_path):
    """The command that was printed, as a person runs it."""
    key = Path(command[command.index("--key-file") + 1])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    words = [MILES, *command[1:], "--run-dir", str(tmp_path / key.stem)]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.full
async def test_the_printed_commands_join_and_who_is_missing_is_told(tmp_path):
    said, processes = [], []
    async with Controller(ControllerConfig(status=False)) as controller:
        agents = external(controller, ["a", "b"], tmp_path, said, flags=["--cpu-slots", "3"])
        entering = asyncio.create_task(agents.__aenter__())
        await eventually(lambda: any("missing: a, b" in line for line in said), 30)
        commands = [shlex.split(line) for line in said if line.startswith("  miles agent")]
        assert len(commands) == 2
        for command in commands:
            processes.append(by_hand(command, tmp_path))
            await eventually(lambda: entering.done() or "1 of 2 nodes have joined; missing: b" in said, 60)
        await asyncio.wait_for(entering, 60)
        assert said[-1] == "all 2 nodes have joined"
        assert [node.info.devices for node in controller.fabric.nodes] == [(0, 1, 2)] * 2
        assert not (tmp_path / "join").exists()
        await agents.__aexit__(None)
    codes = [await asyncio.to_thread(process.wait, 60) for process in processes]
    assert codes == [0, 0]


async def test_nodes_that_do_not_come_are_named_and_the_keys_are_gone(tmp_path):
    said = []
    async with Controller(ControllerConfig(status=False)) as controller:
        with pytest.raises(NodesMissing) as error:
            await external(controller, ["a", "b"], tmp_path, said, timeout_s=0.05).__aenter__()
    assert "a" in error.value.what + error.value.evidence
    assert not (tmp_path / "join").exists()


async def test_keys_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "join").write_text("")
    async with Controller(ControllerConfig(status=False)) as controller:
        with pytest.raises(CannotWriteKeys) as error:
            await external(controller, ["a"], tmp_path, []).__aenter__()
    assert str(tmp_path / "join") in error.value.what


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.parents[1] / "elsewhere"), os.mkfifo])
async def test_what_is_in_the_place_of_a_key_file_gets_no_key_and_is_not_waited_for(tmp_path, make):
    (tmp_path / "join").mkdir(mode=0o777)
    make(tmp_path / "join" / "a.key")
    async with Controller(ControllerConfig(status=False)) as controller:
        agents = external(controller, ["a"], tmp_path, [])
        agents._write_keys()
        assert stat.S_IMODE((tmp_path / "join").stat().st_mode) == 0o700
        key = agents.key_file("a")
        assert key.is_file() and not key.is_symlink() and stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not (tmp_path / "elsewhere").exists()


async def test_a_directory_for_keys_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.key").write_text("of another")
    (tmp_path / "join").symlink_to(tmp_path / "elsewhere")
    async with Controller(ControllerConfig(status=False)) as controller:
        with pytest.raises(CannotWriteKeys):
            await external(controller, ["a"], tmp_path, []).__aenter__()
    assert (tmp_path / "elsewhere" / "a.key").read_text() == "of another"


def blocks(language):
    """Code blocks of the document."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)


def agent_options(text):
    """Of the ``miles agent`` that stands in a command of the document."""
    words = shlex.split(text.replace("\\\n", " "))
    start = words.index("agent")
    assert words[start - 1].rpartition("/")[2] == "miles"
    return _parser().parse_args(words[start:])


def test_the_systemd_unit_of_the_document_is_one():
    (text,) = blocks("ini")
    unit = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)
    unit.optionxform = str
    unit.read_string(text)
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    options = agent_options(unit["Service"]["ExecStart"])
    assert (options.command, options.key_file) == ("agent", "/etc/miles/node.key")
    assert options.controller.startswith("tcp://")
    assert unit["Service"]["Restart"] == "on-failure"  # it ends with 0 when its run does


def test_the_kubernetes_example_of_the_document_is_one():
    (text,) = blocks("yaml")
    found = {each["kind"]: each for each in yaml.safe_load_all(text)}
    assert set(found) == {"Service", "Job"}
    job = found["Job"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    script = container["command"][-1]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    options = agent_options(script)
    assert options.node == "node-$JOB_COMPLETION_INDEX"
    # A secret is mounted as links, which miles agent does not follow: it is copied, for its user alone.
    assert f"install -m 600 /keys/{options.node}.key {options.key_file}" in script
    assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    assert any(volume.get("secret", {}).get("secretName") == "miles-keys" for volume in pod["volumes"])
