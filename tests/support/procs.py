"""Helpers for tests with real processes: wait for a condition, name a process for good."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process for good: pids are used again, the start time (clock ticks since boot) tells them apart."""

    pid: int
    start_time: int


def process_identity(pid: int) -> ProcessIdentity | None:
    """Of the process that has this pid now; None if there is none."""
    fields = _stat(pid)
    return ProcessIdentity(pid, int(fields[19])) if fields else None


def alive(identity: ProcessIdentity | None) -> bool:
    """Whether that very process still runs. A zombie does not."""
    if identity is None:
        return False
    fields = _stat(identity.pid)
    return bool(fields) and int(fields[19]) == identity.start_time and fields[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/<pid>/stat`` from the third (state) on: the second may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


BOUND = (
    "import os, sys; from miles_agents.agent.exec_shim import bind_life_to_parent; "
    "bind_life_to_parent(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


def bound_to_us(program: Sequence[str]) -> list[str]:
    """A command that becomes ``program``, which ends with this process's main thread, however that ends."""
    return [sys.executable, "-c", BOUND, str(os.getpid()), *program]


async def eventually(predicate: Callable[[], object], timeout: float = 10.0, *, what: str = "") -> None:
    """Wait until the predicate holds.

    Raises:
        AssertionError: It did not within ``timeout`` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not predicate():
        if loop.time() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or predicate}")
        await asyncio.sleep(POLL_S)


def eventually_sync(predicate: Callable[[], object], timeout: float = 10.0, *, what: str = "") -> None:
    """The same without an event loop."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or predicate}")
        time.sleep(POLL_S)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filling = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        with suppress(OSError):
            while True:
                filling.append(os.dup(filling[0]))
        yield
    finally:
        for fd in filling:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
