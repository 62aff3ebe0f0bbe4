"""What runs first on a host, as a process of its own without ssh: what it refuses, and that it leaves nothing then."""

import json
import os
import subprocess
import sys
import time

import pytest
from support.procs import eventually_sync

from miles_launcher import remote_start
from miles_launcher.ssh_start import Machine, OwnCode, Run, header, start_words


@pytest.fixture(scope="module")
def code():
    return OwnCode.read()


@pytest.fixture
def head(tmp_path, code):
    """What a host would be sent, with changes."""

    def make(*, flags=(), **changes):
        run = Run(
            run_id="r", run_dir=tmp_path / "run", code=code, copies_code=False, modules=(), shared={},
            flags=("--controller", "tcp://127.0.0.1:1"), env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )  # fmt: skip
        plain = json.loads(header(run, Machine("n", "n"), "mark", flags))
        return {**plain, **changes}

    return make


def start(head, tmp_path, further=b""):
    """Run it; returns what it said, its exit code and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", remote_start.LOADER], input=json.dumps(head).encode() + b"\n" + further,
        capture_output=True, env={**os.environ, "HOME": str(tmp_path)}, timeout=100, check=False,
    )  # fmt: skip
    lines = [line.partition(" ")[2] for line in done.stdout.decode().splitlines() if line.startswith("mark ")]
    return [json.loads(line) for line in lines], done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"python": [9, 1]}, "python", "9.1 or newer is needed"),
        ({"modules": ["json", "no_such_module.x"]}, "modules", "does not find no_such_module.x"),
        ({"fingerprint": "0"}, "code", "its code is another"),
        ({"versions": {"pyzmq": "0.1", "no-such": "1"}}, "versions", "here 0.1"),
    ],
)
def test_what_is_not_as_it_has_to_be_is_refused(head, tmp_path, changes, error, words):
    (said,), exit_code, _ = start(head(**changes), tmp_path)
    assert (said["kind"], said["error"], exit_code) == ("failed", error, remote_start.REFUSED_CODE)
    assert words in said["text"]
    assert not (tmp_path / ".cache").exists()


def test_builds_of_one_version_are_the_same(head, tmp_path):
    from importlib.metadata import version

    built = version("pyzmq").partition("+")[0] + "+other"
    said, _, _ = start(head(versions={"pyzmq": built}), tmp_path)
    assert said[0]["kind"] == "ready"


def test_the_agent_gets_its_flags_and_takes_the_key_itself(head, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".miles-shared-r").write_text("token")
    wanted = head(flags=("--cpu-slots", "-3"), shared={str(tmp_path / "run"): "token", "/proc": "token"})
    (said,), exit_code, stderr = start(wanted, tmp_path, b"key\n")
    assert said["shared"] == [str(tmp_path / "run")]
    assert said["logs"] == str(tmp_path / "run")
    assert exit_code == 2
    assert "--cpu-slots -3 is no number of slots" in stderr


def test_logs_of_a_run_directory_that_is_not_shared_stay_in_the_home(head, tmp_path):
    said, _, _ = start(head(shared={str(tmp_path): "token"}), tmp_path, b"key\n")
    assert said[0]["shared"] == []
    assert said[0]["logs"] == str(tmp_path / ".cache/miles/runs/r/n")


def test_a_host_with_logs_of_another_run_starts_one(head, tmp_path):
    """What is sent is run from its top to its end: the sweep needs all that it uses before that."""
    (tmp_path / ".cache/miles/runs/another/n").mkdir(parents=True)
    said, _, stderr = start(head(), tmp_path, b"key\n")
    assert [one["kind"] for one in said] == ["ready"], stderr
    assert sorted(os.listdir(tmp_path / ".cache/miles/runs")) == ["another", "r"]


def test_code_that_does_not_come_leaves_no_directory(head, tmp_path):
    said, exit_code, _ = start(head(copies_code=True), tmp_path)  # stdin ends
    assert [one["kind"] for one in said] == ["wants_code", "failed"]
    assert exit_code == remote_start.REFUSED_CODE
    assert not os.path.exists(said[0]["directory"])


@pytest.mark.parametrize("changes", [{"modules": ["no_such_module"]}, {}], ids=["refused", "without its key"])
def test_code_of_an_agent_that_does_not_start_is_removed(head, tmp_path, changes):
    said, exit_code, _ = start(head(copies_code=True, **changes), tmp_path, b"go\n")
    assert [one["kind"] for one in said] == ["wants_code", "failed" if changes else "ready"]
    assert exit_code == (remote_start.REFUSED_CODE if changes else 2)
    assert not os.path.exists(said[0]["directory"])


def test_what_nobody_holds_is_swept_but_not_what_is_young_or_held(tmp_path):
    import fcntl

    for name in ("old", "held"):
        (tmp_path / name).mkdir()
    fd = os.open(tmp_path / "held", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        remote_start.sweep(tmp_path, 3600.0)
        assert sorted(os.listdir(tmp_path)) == ["held", "old"]
        remote_start.sweep(tmp_path, 3600.0, time.time() + 4000)
        assert os.listdir(tmp_path) == ["held"]
    finally:
        os.close(fd)


def test_what_changed_lately_below_is_not_swept(tmp_path):
    log = tmp_path / "run" / "node" / "agent.log"
    log.parent.mkdir(parents=True)
    began = os.stat(log.parent).st_ctime
    eventually_sync(lambda: log.write_text("") == 0 and os.stat(log).st_ctime > began + 0.1, 60)
    log.write_text("later than its directory changed")
    wrote, changed = os.stat(log).st_ctime, os.stat(log.parent).st_ctime
    assert wrote > changed
    remote_start.sweep(tmp_path, 3600.0, 3600.0 + (wrote + changed) / 2)
    assert log.exists()
    remote_start.sweep(tmp_path, 3600.0, 3601.0 + wrote)
    assert not log.exists()


@pytest.mark.parametrize(
    ("python", "begins"),
    [("/opt/py thon", "exec '/opt/py thon' -c "), ("~/venv/bin/python", "exec ~/venv/bin/python -c ")],
)
def test_the_login_shell_is_given_one_command(python, begins):
    assert start_words(python).startswith(begins)
    assert subprocess.run(["sh", "-n", "-c", start_words(python)], check=False).returncode == 0
