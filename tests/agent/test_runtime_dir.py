import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.procs import alive, eventually_sync, process_identity

from miles_agents.runtime_dir import (
    SOCKET_ADDRESS_BYTES,
    SOCKET_NAME_BYTES,
    InvalidRunId,
    SocketPathTooLong,
    UnsafeDirectory,
    _hold,
    live_runs,
    runtime_dir,
    sweep,
)

HOLDER = "from miles_agents.runtime_dir import runtime_dir; d = runtime_dir('r1'); print(d.path, flush=True); input()"


@pytest.fixture
def base(monkeypatch):
    """A fresh XDG_RUNTIME_DIR (short, mode 0700), returned with our part appended."""
    session = os.environ["XDG_RUNTIME_DIR"]
    path = os.path.join(session, f"t{os.urandom(2).hex()}")
    os.mkdir(path, 0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", path)
    return Path(path) / "miles"


@pytest.fixture
def holder(base):
    """Another process that holds run r1."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def mode(path):
    return os.stat(path).st_mode & 0o7777


def test_the_directory_is_private_and_gone_afterwards(base):
    with runtime_dir("r1") as path:
        assert path == base / "r1"
        assert mode(path) == mode(base) == 0o700
        (path / "sub").mkdir()
        (path / "sub" / "agent.sock").touch()
    assert not path.exists()


def test_a_umask_that_opens_files_to_all_does_not_matter(base):
    before = os.umask(0)
    try:
        with runtime_dir("r1") as path:
            assert mode(path) == 0o700
    finally:
        os.umask(before)


def test_whoever_lets_go_last_removes_it(base):
    first, second = runtime_dir("r1"), runtime_dir("r1")
    (first.path / "status.json").touch()
    first.close()
    assert (second.path / "status.json").exists()
    second.close()
    assert not second.path.exists()
    second.close()


def test_without_an_xdg_directory_it_lies_in_tmp(base, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with runtime_dir(f"t{os.urandom(4).hex()}") as path:
        assert str(path.parent) == f"/tmp/miles-{os.geteuid()}"
        assert mode(path.parent) == 0o700
        assert path.name in live_runs()


@pytest.mark.parametrize("named", ["relative", "/nonexistent", "/tmp", "/tmp/" + "long" * 20])
def test_an_unusable_xdg_directory_is_not_used(base, monkeypatch, named):
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    with runtime_dir(f"t{os.urandom(4).hex()}") as path:
        assert str(path.parent) == f"/tmp/miles-{os.geteuid()}"


def test_a_symbolic_link_is_refused(base, tmp_path):
    base.mkdir(0o700)
    (base / "r1").symlink_to(tmp_path)
    with pytest.raises(UnsafeDirectory, match="symbolic link"):
        runtime_dir("r1")
    (base / "r1").unlink()
    base.rmdir()
    base.symlink_to(tmp_path)
    with pytest.raises(UnsafeDirectory, match="symbolic link"):
        runtime_dir("r1")


def test_a_directory_open_to_others_is_refused(base):
    base.mkdir(0o700)
    base.chmod(0o755)
    with pytest.raises(UnsafeDirectory, match="0755"):
        runtime_dir("r1")


def test_a_plain_file_in_its_place_is_refused(base):
    base.touch(0o600)
    with pytest.raises(UnsafeDirectory, match="not a directory"):
        runtime_dir("r1")


@pytest.mark.parametrize("run_id", ["", "..", "a/b", ".hidden", "x" * 33, "a b", "a\n", "ü"])
def test_a_run_id_that_cannot_name_a_directory_is_refused(base, run_id):
    with pytest.raises(InvalidRunId):
        runtime_dir(run_id)
    assert not base.exists()


def test_the_longest_names_fit_into_a_socket_address(base, monkeypatch):
    longest = "/tmp/" + "x" * (35 - len("/tmp/"))
    os.makedirs(longest, 0o700, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", longest)
    try:
        directory = runtime_dir("r" * 32)
        assert len(str(directory.socket_path("s" * SOCKET_NAME_BYTES))) == SOCKET_ADDRESS_BYTES
        with pytest.raises(SocketPathTooLong, match="108 bytes"):
            directory.socket_path("s" * (SOCKET_NAME_BYTES + 1))
        directory.close()
    finally:
        os.rmdir(longest + "/miles")
        os.rmdir(longest)


def test_a_directory_that_another_process_holds_stays(holder):
    assert "r1" in live_runs()
    directory = runtime_dir("r1")
    directory.close()
    assert directory.path.exists()
    assert sweep() == []


def test_the_directory_of_a_killed_process_is_swept(holder, base):
    (base / "r1" / "agent.sock").touch()
    identity = process_identity(holder.pid)
    os.kill(holder.pid, signal.SIGKILL)
    eventually_sync(lambda: not alive(identity))
    assert "r1" not in live_runs()  # this user may have other runs
    assert base / "r1" in sweep()
    assert not (base / "r1").exists()


def test_a_stopped_process_still_holds_its_directory(holder, base):
    os.kill(holder.pid, signal.SIGSTOP)
    assert base / "r1" not in sweep()
    assert (base / "r1").exists()


def test_making_a_directory_sweeps_and_what_the_dead_left_in_it_is_gone(holder, base):
    (base / "r1" / "status.json").touch()
    identity = process_identity(holder.pid)
    os.kill(holder.pid, signal.SIGKILL)
    eventually_sync(lambda: not alive(identity))
    with runtime_dir("r2"):
        assert not (base / "r1").exists()
    with runtime_dir("r1") as path:
        assert list(path.iterdir()) == []


def test_a_directory_that_was_made_again_by_others_is_not_emptied(base):
    """Whoever opened it before it was removed holds a lock on nothing."""
    first = runtime_dir("r1")
    stale = os.open(first.path, os.O_RDONLY)
    try:
        first.close()
        assert not first.path.exists()
        with runtime_dir("r1") as path:
            (path / "agent.sock").touch()
            assert not _hold(path, stale)
            assert (path / "agent.sock").exists()
    finally:
        os.close(stale)


def test_many_processes_joining_and_leaving_at_once_never_lose_the_directory(base):
    loop = (
        "import os\n"
        "from miles_agents.runtime_dir import runtime_dir\n"
        "for turn in range(100):\n"
        "    with runtime_dir('r1') as path:\n"
        "        mine = path / f'{os.getpid()}-{turn}'\n"
        "        mine.touch()\n"
        "        assert mine.exists()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", loop], stderr=subprocess.PIPE) for _ in range(4)]
    told = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert list(base.iterdir()) == []
