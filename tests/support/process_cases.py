"""Real processes for tests of process hygiene: commands, hard-to-kill trees, and proof that nothing is left."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from miles_agents.agent.process import Command
from miles_agents.agent.process_tree import ProcessId, is_alive

DEADLINE_S = 30.0

REPORT = """
import ctypes, os, signal, sys, time
def report(kind):
    tail = open('/proc/self/stat').read().rpartition(')')[2].split()
    fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f'{kind} {os.getpid()} {tail[19]}\\n'.encode())
    os.close(fd)
def forever():
    while True:
        signal.pause()
"""
"""Preamble: ``report(kind)`` appends the process's identity to the file that is the first argument."""

EVADER = (
    REPORT
    + """
def evade():
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(15, b'kworker/0:0) (x', 0, 0, 0)
    tail = open('/proc/self/stat').read().rpartition(')')[2].split()
    arg_start, arg_end, env_start, env_end = map(int, tail[45:49])
    ctypes.memset(arg_start, 0, arg_end - arg_start)
    ctypes.memset(env_start, 0, env_end - env_start)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        path = sys.argv[1]
        evade()
        report('evader')
        if os.fork() == 0:
            report('evader')
        forever()
    os._exit(0)
os.wait()
if os.fork() == 0:
    report('member')
    forever()
report('child')
"""
)
"""A child that ignores TERM, with a member of its group and two that left session, title and environment behind."""

FORKER = (
    REPORT
    + """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
report('child')
count = 0
while True:
    if os.fork() == 0:
        if count % 2:
            os.setsid()
        if os.fork() == 0:
            if count == 20:
                report('many')
            time.sleep(60)
        os._exit(0)
    count += 1
    try:
        while count > 40 and os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    time.sleep(0.002)
"""
)
"""Forks as fast as this machine bears, every second time out of its session, always leaving an orphan."""

HELD_BY_DEBUGGER = (
    REPORT
    + """
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)
report('child')
forever()
"""
)
"""A process that anybody may trace."""

DEBUGGER = """
import ctypes, sys, signal
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(0x4206, int(sys.argv[1]), None, ctypes.c_void_p(int(sys.argv[2]))) == 0, ctypes.get_errno()
print('attached', flush=True)
signal.pause()
"""
"""Attaches to the pid in its first argument and never waits: killed, that process stays a zombie; with the option
``TRACE_EXIT`` as second argument (else 0) it hangs in its exit instead and keeps its children."""

TRACE_EXIT = "64"


def python(
    tmp_path: Path,
    code: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    cpus: tuple[int, ...] | None = None,
    numa_node: int | None = None,
) -> Command:
    """A command that runs ``code`` in a bare interpreter."""
    return Command(
        argv=(sys.executable, "-I", "-S", "-c", code, *arguments),
        env={"PATH": os.defpath} if env is None else env,
        cwd=tmp_path,
        log_path=tmp_path / "child.log",
        pass_fds=pass_fds,
        cpus=cpus,
        numa_node=numa_node,
    )


def reported(path: Path, kind: str = "") -> list[ProcessId]:
    """Who reported so far (of one kind)."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.split() for line in lines]
    return [ProcessId(int(pid), int(start)) for name, pid, start in rows if kind in ("", name)]


def alive(processes: list[ProcessId]) -> list[ProcessId]:
    """Those that still run."""
    return [process for process in processes if is_alive(process)]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition of other processes, on the loop."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.01)


def until_sync(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition of other processes, without a loop."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)


def open_fds() -> set[str]:
    """Descriptors of this process, without the one that lists them."""
    entries = set(os.listdir("/proc/self/fd"))
    return {entry for entry in entries if os.path.lexists(f"/proc/self/fd/{entry}")}
