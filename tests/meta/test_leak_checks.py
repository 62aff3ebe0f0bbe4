"""The leak checks themselves: each kind of leftover is found, and named."""

import os
import re
import socket
import subprocess
import sys
import threading
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
from support.leaks import adopt_orphans, adopts_orphans, forget, keep, no_leaks
from support.procs import alive, eventually_sync, process_identity

from miles_agents.agent.process import become_subreaper
from miles_agents.runtime_dir import runtime_dir


def leaked(match):
    return pytest.raises(AssertionError, match=match)


def test_an_open_descriptor_is_named(tmp_path):
    with leaked(re.escape(str(tmp_path / "open.txt"))), no_leaks(0.1):
        file = (tmp_path / "open.txt").open("w")
    file.close()


def test_a_listening_socket_is_named_with_its_address():
    with leaked(r"socket LISTEN .*127\.0\.0\.1"), no_leaks(0.1):
        listener = socket.create_server(("127.0.0.1", 0))
    listener.close()


def test_a_memfd_is_named():
    with leaked("memfd:forgotten"), no_leaks(0.1):
        fd = os.memfd_create("forgotten")
    os.close(fd)


def test_a_thread_is_named():
    end = threading.Event()
    with leaked("thread: straggler"), no_leaks(0.1):
        thread = threading.Thread(target=end.wait, name="straggler")
        thread.start()
    end.set()
    thread.join()


def test_a_child_is_named_with_its_command_line():
    with leaked(r"process: pid \d+ .*forever"), no_leaks(0.1):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  # forever"])
    child.kill()
    child.wait()


def test_what_lasts_for_the_session_is_no_leak_and_what_it_starts_is_one():
    ours, theirs = socket.socketpair()
    code = "import subprocess, sys; subprocess.Popen(['sleep', '1000']); sys.stdin.read()"
    with leaked(r"process: pid \d+ sleep 1000") as caught, no_leaks(0.1):
        child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs)
        theirs.close()
        keep(child.pid, ours.fileno())
        eventually_sync(lambda: [one.name() for one in psutil.Process(child.pid).children()] == ["sleep"])
    assert str(child.pid) not in re.findall(r"pid (\d+)", str(caught.value))
    assert "descriptor" not in str(caught.value)
    sleeper = process_identity(int(re.search(r"pid (\d+)", str(caught.value))[1]))
    os.kill(sleeper.pid, 9)
    ours.close()
    child.wait()
    forget(child.pid)
    eventually_sync(lambda: not alive(sleeper))


def test_a_zombie_is_named():
    with leaked(r"process: pid \d+ \(zombie, was true\)"), no_leaks(0.1):
        child = subprocess.Popen(["true"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.wait()


def test_adopting_orphans_does_not_outlast_the_module():
    become_subreaper()
    with no_leaks(0.1):
        pass
    assert adopts_orphans()
    adopt_orphans(False)
    with no_leaks(0.1):
        become_subreaper()
    assert not adopts_orphans()


def test_a_process_that_left_the_family_is_found_by_its_mark():
    daemon = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(1000)  # daemon"
    with leaked(r"process: pid \d+ .*daemon") as caught, no_leaks(0.1):
        subprocess.run([sys.executable, "-c", daemon], check=True)
    pid = int(re.search(r"pid (\d+)", str(caught.value))[1])
    identity = process_identity(pid)
    os.kill(pid, 9)
    eventually_sync(lambda: not alive(identity))


def test_shared_memory_is_named():
    with leaked("shared memory: /dev/shm/"), no_leaks(0.1):
        segment = shared_memory.SharedMemory(create=True, size=4096)
        segment.close()
    segment.unlink()
    # multiprocessing keeps a helper process for segments: end it, or this very test leaks.
    from multiprocessing import resource_tracker

    resource_tracker._resource_tracker._stop()


def test_a_runtime_directory_is_named():
    with leaked("runtime directory: .*/left"), no_leaks(0.1):
        directory = runtime_dir("left")
    directory.close()


def test_what_goes_away_in_time_is_no_leak():
    with no_leaks(5.0):
        threading.Timer(0.2, lambda: None).start()


def test_a_reused_pid_is_not_the_same_process():
    identity = process_identity(os.getpid())
    assert alive(identity)
    assert not alive(type(identity)(identity.pid, identity.start_time + 1))
    assert not alive(process_identity(2**22))


def test_a_process_that_is_bound_to_a_session_ends_when_that_is_killed():
    """As the real engine of the tests, which nobody else would end then."""
    code = (
        "import subprocess, sys, time; from support.procs import bound_to_us; "
        "child = subprocess.Popen(bound_to_us(['sleep', '1000'])); print(child.pid, flush=True); time.sleep(1000)"
    )
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    session = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    with session.stdout:
        bound = process_identity(int(session.stdout.readline()))
    eventually_sync(lambda: psutil.Process(bound.pid).name() == "sleep", 60.0)
    assert alive(bound)
    session.kill()
    session.wait()
    eventually_sync(lambda: not alive(bound), 60.0)
