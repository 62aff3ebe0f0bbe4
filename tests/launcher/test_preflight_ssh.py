"""The preflight check through a program named ssh that fails, hangs, leaves processes, or notes what it is given."""

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop
from support.procs import alive, eventually, process_identity

from miles_agents import probe
from miles_launcher import doctor
from miles_launcher.preflight.channel import NoAnswer, ProcessChannel
from miles_launcher.preflight.examine import examine
from miles_launcher.preflight.needs import Needs

LONG_S = 60.0
SSH = """#!/bin/bash
echo "$@" >> {notes}
words="${{@: -1}}"
host="${{@: -2:1}}"
{act}
"""
REFUSES = 'echo "connect to host $host port 22: Connection refused" >&2; exit 255'
HELPER = 'sleep 1000 & echo $! > {pid}; echo "proxy says hello" >&2; echo \'miles-probe:{{"now": 1}}\'; '


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """Puts it on PATH, with what it does; returns the file of its arguments."""
    bin_, notes = tmp_path / "bin", tmp_path / "notes"
    bin_.mkdir()
    monkeypatch.setenv("PATH", str(bin_), prepend=":")

    def put(act):
        (bin_ / "ssh").write_text(SSH.format(notes=notes, act=act))
        (bin_ / "ssh").chmod(0o755)
        return notes

    return put


def by_uvloop(work):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def channel(name="a"):
    return ProcessChannel(name, lambda arguments: ["ssh", name, *arguments])


def test_hosts_that_all_refuse_at_once_are_each_told_with_their_reason(fake_ssh):
    fake_ssh('exec 0<&-; host="$1"; ' + REFUSES)
    names = [f"n{number}" for number in range(6)]
    found = by_uvloop(examine([channel(name) for name in names], Needs(device="cpu")))
    assert [host.facts for host in found.hosts] == [None] * 6
    for host in found.hosts:
        assert f"connect to host {host.name} port 22: Connection refused" in host.error


def test_a_host_that_ended_between_two_questions_does_not_answer():
    async def ask():
        asked = ProcessChannel("a", lambda arguments: [sys.executable, *arguments])
        await asked.ask("clock", LONG_S)
        asked._process.send_signal(signal.SIGTERM)
        await asked._process.wait()
        asked._process.stdin.close()  # as uvloop does by itself, sooner or later
        with pytest.raises(NoAnswer, match="a does not answer"):
            await asked.ask("clock", LONG_S)

    by_uvloop(ask())


async def started_helper(tmp_path):
    """Of an ssh that has answered once: the process that it started."""
    pid = int((tmp_path / "pid").read_text())
    identity = process_identity(pid)
    assert alive(identity)
    return identity


async def test_what_an_ssh_that_hangs_has_started_ends_with_it(fake_ssh, tmp_path):
    fake_ssh(HELPER.format(pid=tmp_path / "pid") + "exec sleep 1000")
    asked = channel()
    assert await asked.ask("clock", LONG_S) == {"now": 1}
    helper = await started_helper(tmp_path)
    with pytest.raises(NoAnswer) as error:
        await asked.ask("clock", 0.1)
    assert "nothing within 0.1 s; it wrote: proxy says hello" in error.value.evidence
    await eventually(lambda: not alive(helper), LONG_S)


async def test_what_an_ssh_that_failed_has_left_is_ended(fake_ssh, tmp_path):
    fake_ssh(f"sleep 1000 > /dev/null & echo $! > {tmp_path / 'pid'}; {REFUSES}")
    with pytest.raises(NoAnswer, match="a does not answer") as error:
        await channel().ask("clock", LONG_S)
    assert "Connection refused" in error.value.evidence
    pid = int((tmp_path / "pid").read_text())
    await eventually(lambda: not alive(process_identity(pid)), LONG_S)


async def test_nothing_is_left_where_closing_is_broken_off(fake_ssh, tmp_path):
    fake_ssh(HELPER.format(pid=tmp_path / "pid") + "exec sleep 1000")
    asked = channel()
    await asked.ask("clock", LONG_S)
    helper = await started_helper(tmp_path)
    closing = asyncio.create_task(asked.close())
    await asyncio.sleep(0)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    await eventually(lambda: not alive(helper), LONG_S)
    await asked._process.wait()


SECRET, INNOCENT = "hunter2-of-hostfile", 'it\'s a "quoted" $value'


def test_variables_of_a_hostfile_reach_the_host_and_no_command_line(fake_ssh, tmp_path, capsys):
    notes = fake_ssh('test "$1" = -G || exec sh -c "$words"')
    words = ["--controller-host", "127.0.0.1", "--remote-python", sys.executable, "--run-dir", str(tmp_path), "--json"]
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"a slots=2 env.NCCL_NET_SECRET={SECRET}\n")
    doctor.main([*words, "--hostfile", str(hostfile)])
    said = capsys.readouterr()
    assert said.err == ""
    env = json.loads(said.out)["hosts"][0]["facts"]["env"]
    assert env["NCCL_NET_SECRET"] == SECRET
    assert env["CUDA_VISIBLE_DEVICES"] == "0,1"  # as its agent would have it, for slots=2
    assert "-c" in notes.read_text()
    assert SECRET not in notes.read_text()


def test_variables_of_a_host_that_does_not_answer_are_not_told(fake_ssh, tmp_path, capsys):
    notes = fake_ssh(REFUSES)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"n{number} env.TOKEN={SECRET}\n" for number in range(4)))
    words = ["--controller-host", "127.0.0.1", "--hostfile", str(hostfile), "--run-dir", str(tmp_path), "--json"]
    assert doctor.main(words) == 1
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert [host["name"] for host in told["hosts"]] == ["n0", "n1", "n2", "n3"]
    for host in told["hosts"]:
        assert f"connect to host {host['name']} port 22: Connection refused" in host["error"]
    assert SECRET not in said.out + said.err + notes.read_text()


def read_proc(pid, name):
    return Path(f"/proc/{pid}/{name}").read_text()


async def test_variables_are_there_before_python_starts(tmp_path):
    (tmp_path / "only_there.py").write_text("")
    env = {"PYTHONPATH": str(tmp_path), "NCCL_DEBUG": INNOCENT}
    asked = ProcessChannel("a", lambda arguments: [sys.executable, *arguments], env)
    found = await asked.ask("facts", LONG_S, gpus=False, code=False)
    line, path = (read_proc(asked._process.pid, name) for name in ("cmdline", "environ"))
    await asked.close()
    assert found["env"]["NCCL_DEBUG"] == INNOCENT
    assert INNOCENT not in line
    assert f"PYTHONPATH={tmp_path}" in path
    assert asked._process.returncode == 0


def test_gpus_are_told_by_uuid():
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetName=lambda handle: b"H100",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}".encode(),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=8, free=6),
    )
    assert probe._gpu(nvml, 3) == {
        "index": 3, "uuid": "GPU-3", "name": "H100", "total_bytes": 8, "free_bytes": 6, "processes": [],
    }  # fmt: skip
