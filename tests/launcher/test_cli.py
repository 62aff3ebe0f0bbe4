import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.procs import eventually_sync

from miles_agents.runtime_dir import runtime_dir
from miles_controller import Controller, ControllerConfig
from miles_controller.status_server import STATUS_FILE, StatusServer
from miles_launcher.cli import main

KEY = '{"run_id":"r1","node":"node-0","secret":"Kx<@top-secret"}'
AGENT = [sys.executable, "-m", "miles_launcher.cli", "agent"]
ADDRESS = ["--controller", "tcp://127.0.0.1:7100"]
FOUR_PARTS = re.compile(r"^.+\n  evidence: [\s\S]+\n  what to do: .+\n  code: E-[A-Z]+-\d{3} \(docs/errors\.md\)\n$")


def run_agent(flags=(), stdin=KEY + "\n", env=None, **options):
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = [*AGENT, *ADDRESS, *flags]
    return subprocess.run(command, check=False, input=data, env=env, capture_output=True, timeout=60, **options)


def refused(result, code):
    told = result.stderr.decode()
    assert result.returncode == 2, told
    assert FOUR_PARTS.match(told), told
    assert code in told
    assert "top-secret" not in told
    return told


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o600)
    return path


# --- miles agent


def test_the_agent_gets_its_flags_and_the_key_but_not_where_others_can_see_it(fake_agent, report):
    flags = ["--node", "node-0", "--cpu-slots", "4", "--interface", "lo", "--run-dir", "/tmp/x", "--beat-s", "0.5"]
    flags += ["--store-bytes", "9000000", "--preload", "torch,numpy"]
    result = run_agent(flags, env=fake_agent)
    assert (result.returncode, result.stderr) == (0, b"")
    told = report()
    assert told["argv"] == ["--also-import", "miles_controller.controller,miles_launcher.local", *ADDRESS, *flags]
    assert told["key"] == KEY + "\n"
    assert "top-secret" not in json.dumps([told["argv"], told["env"]])


def test_the_agent_runs_below_the_reaper(fake_agent, report):
    with subprocess.Popen([*AGENT, *ADDRESS], stdin=subprocess.PIPE, env=fake_agent) as process:
        process.stdin.write(KEY.encode() + b"\n")
        process.stdin.flush()
        eventually_sync(report)
        assert report()["ppid"] == process.pid
        command = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        assert "miles_launcher.cli" not in command
        assert any(part.endswith("agent/reaper.py") for part in command)
        process.stdin.close()
        assert process.wait(30) == 0


def test_what_follows_the_key_on_stdin_is_left_to_the_agent(fake_agent):
    result = run_agent(stdin=KEY + "\nafter the key", env={**fake_agent, "FAKE_MODE": "echo"})
    assert result.stdout == b"rest of stdin: after the key\n"


def test_the_agents_exit_code_comes_through(fake_agent):
    result = run_agent(env={**fake_agent, "FAKE_MODE": "fail"})
    assert result.returncode == 1
    assert b"fake agent: no such device" in result.stderr


def test_the_key_can_come_from_a_file(fake_agent, report, key_file):
    assert run_agent(["--key-file", str(key_file)], stdin="", env=fake_agent).returncode == 0
    assert report()["key"] == KEY + "\n"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_key_file_that_others_can_touch_is_refused(key_file, mode):
    key_file.chmod(mode)
    assert f"{mode:04o}" in refused(run_agent(["--key-file", str(key_file)]), "E-CLI-003")


def test_a_key_file_of_somebody_else_is_refused(key_file):
    if os.geteuid() == 0:
        os.chown(key_file, 12345, 12345)
        owner = 12345
    else:  # only root can give files away, but then root's files are somebody else's
        key_file, owner = Path("/etc/passwd"), 0
    assert f"owner uid {owner}" in refused(run_agent(["--key-file", str(key_file)]), "E-CLI-003")


def test_a_key_file_that_is_a_link_a_pipe_or_missing_is_refused(key_file, tmp_path):
    (tmp_path / "link").symlink_to(key_file)
    os.mkfifo(tmp_path / "pipe", 0o600)
    refused(run_agent(["--key-file", str(tmp_path / "link")]), "E-CLI-002")
    refused(run_agent(["--key-file", str(tmp_path / "pipe")]), "E-CLI-003")
    refused(run_agent(["--key-file", str(tmp_path / "missing")]), "E-CLI-002")


@pytest.mark.parametrize(
    ("stdin", "evidence"),
    [
        ("", "ended after 0 bytes"),
        (KEY, f"ended after {len(KEY)} bytes"),
        ("ssh banner: top-secret\n" + KEY + "\n", "not one line of JSON"),
        ("[1]\n", "not an object"),
        ("\n", "not one line of JSON"),
        (b"\xff\xfe\n", "not one line of JSON"),
        ("[" * 4000 + "\n", "not one line of JSON"),
        (" " * 5000 + "\n", "not one line of JSON"),
    ],
)
def test_a_key_line_that_is_none_is_refused_without_being_shown(stdin, evidence):
    assert evidence in refused(run_agent(stdin=stdin), "E-CLI-002")


@pytest.mark.parametrize(("text", "evidence"), [("{\n}", "more than one line"), ("x" * 5000, "more than 4096 bytes")])
def test_a_key_file_with_something_else_in_it_is_refused(key_file, text, evidence):
    key_file.write_text(text)
    assert evidence in refused(run_agent(["--key-file", str(key_file)]), "E-CLI-002")


def test_a_terminal_is_not_asked_for_a_key():
    ours, theirs = pty.openpty()
    try:
        result = subprocess.run([*AGENT, *ADDRESS], check=False, stdin=theirs, capture_output=True, timeout=60)
        assert "terminal" in refused(result, "E-CLI-002")
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--controller", "10.0.0.1:7100"], "E-CLI-001"),
        (["--controller", "tcp://10.0.0.1"], "E-CLI-001"),
        (["--controller", "tcp://10.0.0.1:0"], "E-CLI-001"),
        (["--controller", "tcp://10.0.0.1:65536"], "E-CLI-001"),
        (["--controller", "ipc:///tmp/x"], "E-CLI-001"),
        (["--controller", "tcp://h:1\n"], "E-CLI-001"),
        ([*ADDRESS, "--node", "a/b"], "E-CLI-001"),
        ([*ADDRESS, "--node", ""], "E-CLI-001"),
        ([*ADDRESS, "--cpu-slots", "-1"], "E-CLI-001"),
        ([*ADDRESS, "--store-bytes", "4096"], "E-CLI-001"),
        ([*ADDRESS, "--preload", "numpy,no module"], "E-CLI-001"),
        ([*ADDRESS, "--fence-s", "30"], "E-CFG-001"),
        ([*ADDRESS, "--beat-s", "nan"], "E-CFG-001"),
    ],
)
def test_a_flag_that_cannot_work_is_refused_before_anything_starts(flags, code, capsys):
    assert main(["agent", *flags]) == 2
    told = capsys.readouterr().err
    assert FOUR_PARTS.match(told)
    assert code in told


@pytest.mark.parametrize("argv", [[], ["agent", "--contr", "x"], ["agent", "--cpu-slots", "x"], ["stat"]])
def test_a_command_line_that_does_not_parse_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: miles" in capsys.readouterr().err


def test_a_misspelt_flag_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["agent", "--controler", "tcp://x:1"])
    assert end.value.code == 2
    assert "unrecognized arguments: --controler" in capsys.readouterr().err


def test_a_missing_controller_is_an_error_with_its_four_parts(capsys):
    assert main(["agent"]) == 2
    assert "--controller is missing" in capsys.readouterr().err


def test_the_help_of_an_agent_names_its_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        main(["agent", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--fence-s SECONDS default 15" in said
    assert "<" not in said


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"miles {version('miles')}\n"


def test_the_way_to_the_agent_loads_nothing_heavy():
    heavy = {"asyncio", "zmq", "rich", "psutil", "uvloop", "msgpack", "h11", "urllib.request", "importlib.metadata"}
    check = "import sys; before = set(sys.modules); import miles_launcher.cli; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True, timeout=60)
    loaded = set(result.stdout.split())
    assert "miles_launcher.cli" in loaded
    assert not loaded & heavy


# --- miles status


@pytest.fixture
def status(monkeypatch, capsys):
    """Runs ``miles status`` in a thread, since the server answers on this one's loop: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    async def run(*flags):
        code = await asyncio.to_thread(main, ["status", *flags])
        return (code, *capsys.readouterr())

    return run


def serve(directory, run_id, snapshot):
    return StatusServer(lambda: snapshot, run_id=run_id, directory=directory)


SNAPSHOT = {"run_id": "r1", "anything": [1, {"a": None}]}


FULL = {
    "run_id": "r1",
    "at": 1000.0,
    "address": "tcp://10.0.0.1:7000",
    "nodes": [
        {
            "name": "node-0", "state": "alive", "heard_s_ago": 0.5,
            "inventory": {
                "hostname": "host-a", "cpu_slots": 0, "memory_bytes": 64 * 2**30,
                "gpus": [{"name": "H100"}, {"name": "H100"}],
            },
            "store": {
                "used_bytes": 2**29, "held_bytes": 2**30, "limit_bytes": 6 * 2**30,
                "objects": 3, "holders": 4, "waiting": 1,
            },
            "zygotes": [
                {"name": "torch-1a2b3c", "modules": ["torch"], "state": "ready", "pid": 40, "made": 8,
                 "memory_bytes": 300 << 20},
            ],
        },
        {"name": "node-1", "state": "expected", "heard_s_ago": None},
    ],
    "meshes": [
        {
            "name": "odd [bold]name", "shape": "gpus=2", "failed": "",
            "ranks": [
                {"rank": 0, "node": "node-0", "devices": [0], "pid": 41, "state": "up", "evidence": "",
                 "owes": [{"method": "train", "age_s": 300.0}], "num_owed": 3},
                {"rank": 1, "node": "node-0", "devices": [1], "pid": 42, "state": "dead",
                 "evidence": "killed by SIGKILL (9)", "owes": [], "num_owed": 0},
            ],
        }
    ],
    "services": [{"name": "web", "node": "node-0", "phase": "ready", "pid": 7, "ports": {"http": 20001}, "fault": ""}],
    "locks": {"weights": {"holder": "rank 0 of mesh 2", "waiting": 1}},
    "events": [{"at": 940.0, "subject": "node-0", "text": "joined with 2 devices"}],
}  # fmt: skip


async def test_status_shows_nodes_ranks_services_locks_and_events(status):
    with runtime_dir("r1") as directory:
        async with serve(directory, "r1", FULL):
            code, out, err = await status("--run", "r1")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("node-0 alive 0.5 s host-a 2 x H100 64 GiB 0.5 of 6.0 GiB") for line in lines)
    assert "node-1 expected - - - - -" in lines
    assert "mesh odd [bold]name (gpus=2)" in lines
    assert "0 node-0 0 41 up train for 5 min (+2)" in lines
    assert "1 node-0 1 42 dead: killed by SIGKILL (9) idle" in lines
    assert "node-0 torch-1a2b3c 40 ready 8 300 MiB" in lines
    assert "web node-0 ready 7 http 20001" in lines
    assert "weights rank 0 of mesh 2 1" in lines
    assert "60 s node-0 joined with 2 devices" in lines


async def test_status_reads_what_a_controller_really_serves(status):
    async with Controller(ControllerConfig(nodes=("node-0",))) as controller:
        code, out, err = await status("--run", controller.run_id)
    assert (code, err) == (0, "")
    assert "node-0  expected" in out


async def test_status_prints_the_snapshot_as_it_is_with_json(status):
    with runtime_dir("r1") as directory:
        async with serve(directory, "r1", SNAPSHOT):
            code, out, _ = await status("--run", "r1", "--json")
    assert code == 0
    assert json.loads(out) == SNAPSHOT


async def test_status_ignores_proxies(status, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with runtime_dir("r1") as directory:
        async with serve(directory, "r1", SNAPSHOT):
            assert (await status("--run", "r1", "--json"))[0] == 0


async def test_without_a_run_status_says_so(status):
    code, _, err = await status()
    assert code == 2
    assert FOUR_PARTS.match(err)
    assert "E-CLI-004" in err


async def test_among_several_runs_one_has_to_be_named(status):
    with runtime_dir("r1") as first, runtime_dir("r2") as second:
        async with serve(first, "r1", {"is": 1}), serve(second, "r2", {"is": 2}):
            code, _, err = await status()
            assert code == 2
            assert f"r1: pid {os.getpid()}" in err
            assert f"r2: pid {os.getpid()}" in err
            assert json.loads((await status("--run", "r2", "--json"))[1]) == {"is": 2}
            assert (await status("--run", "r3"))[0] == 2


async def test_a_run_whose_server_does_not_answer_is_an_error(status):
    with runtime_dir("r1") as directory:
        for text in ('{"url": "http://127.0.0.1:9", "token": "x"}', "{", "{}"):
            (directory / STATUS_FILE).write_text(text)
            code, _, err = await status("--run", "r1")
            assert code == 2
            assert FOUR_PARTS.match(err)
            assert "E-CLI-005" in err
