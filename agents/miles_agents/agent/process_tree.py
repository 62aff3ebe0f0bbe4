"""The process tree as /proc shows it: identity, children, descendants, and killing them without ever missing.

A process is named by pid *and* start time; signals go through a pidfd that was checked after it was opened, so a
reused pid is never hit. Nothing here waits, and nothing here needs an event loop.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GONE_STATES = frozenset("ZXx")
"""Zombie and dead: runs no code any more, waits to be reaped."""


class ProcessId(NamedTuple):
    """A process for good: pids are reused, pids with a start time (clock ticks since boot) are not."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/<pid>/stat that matter here (proc_pid_stat(5))."""

    pid: int
    name: str
    state: str
    ppid: int
    group: int
    session: int
    start_time: int

    @property
    def id(self) -> ProcessId:
        """Pid and start time."""
        return ProcessId(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Survivor:
    """A process that did not end although it was killed. ``wchan``: the kernel function that it sleeps in."""

    pid: int
    start_time: int
    name: str
    state: str
    wchan: str

    def describe(self) -> str:
        """One line for people."""
        reason = {"D": "uninterruptible sleep", "Z": "zombie that a debugger holds or whose parent hangs"}
        note = reason.get(self.state, "still running")
        return f"pid {self.pid} ({self.name}): state {self.state}, {note}, in {self.wchan or 'unknown'}"


def read_stat(pid: int) -> Stat | None:
    """What /proc says now, or None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name is in parentheses and may itself hold spaces and parentheses: the last one ends it.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Stat(
        pid=pid,
        name=head.partition("(")[2],
        state=fields[0],
        ppid=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        start_time=int(fields[19]),
    )


def is_alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs (a zombie does not)."""
    stat = read_stat(process.pid)
    return stat is not None and stat.id == process and stat.state not in GONE_STATES


def children_of(pid: int) -> list[int]:
    """The pids of all direct children, zombies too, of all of its threads. Empty if there is no such process."""
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += _children_of_thread(pid, thread)
    except (FileNotFoundError, ProcessLookupError):
        return children
    except NotImplementedError:  # a kernel without CONFIG_PROC_CHILDREN
        return [stat.pid for stat in all_processes() if stat.ppid == pid]
    return children


def _children_of_thread(pid: int, thread: str) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{thread}/children").read_bytes()
    except ProcessLookupError:
        return []
    except FileNotFoundError:
        if Path(f"/proc/{pid}/task/{thread}").exists():
            raise NotImplementedError from None
        return []
    return [int(child) for child in text.split()]


def all_processes() -> Iterator[Stat]:
    """Every process that /proc lists."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (stat := read_stat(int(entry))) is not None:
            yield stat


def descendants(pid: int) -> list[Stat]:
    """Everything below ``pid``, parents before their children; without ``pid`` itself."""
    found: list[Stat] = []
    queue = deque([pid])
    while queue:
        parent = queue.popleft()
        for child in children_of(parent):
            stat = read_stat(child)
            if stat is not None and stat.ppid == parent:
                found.append(stat)
                queue.append(child)
    return found


def kill_below(parent: int, *, spare: Collection[int] = ()) -> list[ProcessId]:
    """SIGKILL everything below ``parent``, but not the direct children in ``spare`` nor what is below those.

    Parents are killed before their children are looked for, so that who forks stops forking first. One pass: what
    appeared behind its back is found by the next one, which is why callers repeat until a pass finds nothing.

    Returns:
        The processes that were still running (zombies are not).
    """
    running: list[ProcessId] = []
    queue = deque([parent])
    while queue:
        above = queue.popleft()
        for pid in children_of(above):
            if above == parent and pid in spare:
                continue
            stat = _kill_child(pid, above)
            if stat is not None and stat.state not in GONE_STATES:
                running.append(stat.id)
                queue.append(pid)
    return running


def _kill_child(pid: int, parent: int) -> Stat | None:
    """SIGKILL ``pid`` if it is a child of ``parent``. None: it is not, or no longer."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # Read after the open: if the number changed hands in between, this shows another parent, or a process
        # that is to die as well; and the descriptor means the old one, which is dead.
        stat = read_stat(pid)
        if stat is None or stat.ppid != parent:
            return None
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return None
    except PermissionError:
        return stat  # changed its user id: reported as a survivor by whoever asked
    finally:
        os.close(fd)
    return stat


def describe_survivor(process: ProcessId) -> Survivor | None:
    """Why a process may still be there, or None if it is gone."""
    stat = read_stat(process.pid)
    if stat is None or stat.id != process:
        return None
    try:
        wchan = Path(f"/proc/{process.pid}/wchan").read_text()
    except OSError:  # hidden from other users, or gone just now
        wchan = ""
    return Survivor(stat.pid, stat.start_time, stat.name, stat.state, "" if wchan == "0" else wchan)
