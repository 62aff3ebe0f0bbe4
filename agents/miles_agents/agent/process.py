"""Starts every process of the agent, knows when each one ends, and ends it with everything below it.

Consumes: ``Command``. Produces: ``Child`` with ``exited``; ``KillReport``. Waits for: the exec of a new child (it,
its death, or ``start_s``); ends of killed processes (up to their deadlines).

Invariants:
* Every child is started from the main thread through ``exec_shim``: it dies with the agent, adopts its own
  orphans, and leads a session of its own.
* Every process that the agent starts is started here, or forked by a zygote and expected here before it becomes a
  child of this process (``expect``, ``adopt``). Whatever else is a child of this process was adopted from a dead child,
  and is killed. Children from before the table was made are left alone.
* A child's output goes to a file, never to a pipe: no reader can block it, no leftover can delay the end.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
from collections.abc import Collection, Mapping
from types import MappingProxyType

from miles_agents.agent import process_kill
from miles_agents.agent.process_child import Child
from miles_agents.agent.process_exit import Exit, OomWatch
from miles_agents.agent.process_gpu import GpuMemoryProbe
from miles_agents.agent.process_kill import KillReport
from miles_agents.agent.process_launch import (
    STARTED,
    CannotStart,
    Command,
    check,
    explain,
    launch,
    no_resources,
    read_report,
)
from miles_agents.agent.process_tree import ProcessId, Survivor, children_of, read_stat
from miles_agents.errors import EnvironmentFault, InternalError

__all__ = [
    "CannotStart",
    "CannotSupervise",
    "Child",
    "Command",
    "Exit",
    "KillReport",
    "NotAdopted",
    "ProcessTable",
    "SpawnOffMainThread",
    "become_subreaper",
]

PR_SET_CHILD_SUBREAPER = 36
_CANCELLED_S = 5.0


class SpawnOffMainThread(InternalError):
    """A child would die with the thread that started it, so only the main thread may start one."""

    code = "E-PROC-002"


class NotAdopted(InternalError):
    """A forked process that was expected did not become a child of this one."""

    code = "E-PROC-004"


class CannotSupervise(EnvironmentFault):
    """The kernel lacks what supervising needs: child subreapers (Linux 3.4), pidfds (5.4)."""

    code = "E-PROC-003"


def become_subreaper() -> None:
    """Make this process adopt the orphans among its descendants. Raises ``CannotSupervise``."""
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # inherited: the kernel would discard exit statuses
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise CannotSupervise(
            "this process cannot adopt orphans",
            evidence=f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}",
            advice="Run on Linux 5.4 or newer, and allow prctl in the container's seccomp profile.",
        )
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        raise CannotSupervise(
            "this kernel has no pidfds",
            evidence=f"pidfd_open: {error}; kernel {os.uname().release}",
            advice="Run on Linux 5.4 or newer, and allow pidfd_open in the container's seccomp profile.",
        ) from None


class ProcessTable:
    """All children of the agent. One per process; belongs to the event loop of the main thread."""

    def __init__(self, *, oom: OomWatch | None = None, gpu: GpuMemoryProbe | None = None) -> None:
        """``oom``: tells out-of-memory kills; by default for the cgroup of this process. ``gpu``: if given, a killed
        tree counts as gone only when none of its processes holds GPU memory."""
        become_subreaper()
        self._children: dict[int, Child] = {}
        self._arriving: dict[int, ProcessId] = {}
        self._oom = oom or OomWatch.of_this_process()
        self._gpu = gpu
        self._strangers = {stat.id for pid in children_of(os.getpid()) if (stat := read_stat(pid)) is not None}

    @property
    def children(self) -> Mapping[int, Child]:
        """The children that have not ended, by pid. A live, read-only view."""
        return MappingProxyType(self._children)

    def spared(self) -> Collection[int]:
        """See ``process_kill.Kin``: our children, those that arrive, and those from before the table."""
        alive = {pid for pid, start in self._strangers if _start_time(pid) == start}
        self._strangers = {process for process in self._strangers if process.pid in alive}
        return alive | self._children.keys() | self._arriving.keys()

    def expect(self, process: ProcessId) -> None:
        """A zygote has forked ``process`` for us, which will be a child of this one. From now until ``adopt`` or
        ``forget`` it is not taken for an orphan; call this before its parent may end."""
        self._arriving[process.pid] = process

    def forget(self, process: ProcessId) -> None:
        """It does not come, or is not wanted: an orphan, if it still becomes a child of this process. Idempotent."""
        if self._arriving.get(process.pid) == process:
            del self._arriving[process.pid]

    def adopt(self, process: ProcessId) -> Child:
        """An expected process is a child of this one now, and leads its own session: watch it like any other.

        Raises:
            NotAdopted: It is not, or everything was killed meanwhile.
        """
        expected = self._arriving.pop(process.pid, None) == process
        stat = read_stat(process.pid)
        if not expected or stat is None or stat.id != process or stat.ppid != os.getpid() or stat.group != process.pid:
            raise NotAdopted(
                f"pid {process.pid} was to become a child of this agent and did not",
                evidence=f"expected: {expected}; the kernel says {stat}",
                advice="Report this, unless the agent was ending everything just then.",
            )
        try:
            return self._watch(process.pid)
        except OSError as error:
            raise NotAdopted(
                f"pid {process.pid} cannot be watched",
                evidence=str(error),
                advice="Raise the limit on open files of this user.",
            ) from None

    async def spawn(self, command: Command, *, start_s: float = 30.0) -> Child:
        """Start ``command`` and return once it is executing.

        Raises:
            CannotStart: It cannot be executed, or did not get there within ``start_s``. Nothing is left running.
            SpawnOffMainThread: Called elsewhere than on the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise SpawnOffMainThread(
                f"cannot start {command.argv[:1]} from thread {threading.current_thread().name}",
                evidence="the kernel would kill the child when this thread ends (PR_SET_PDEATHSIG)",
                advice="Report this; starting processes belongs on the agent's event loop.",
            )
        check(command)
        try:
            child, report_fd = self._start(command)
        except OSError as error:
            raise no_resources(command, error) from None
        try:
            said = await read_report(report_fd, start_s)
        except BaseException:
            child.send(signal.SIGKILL)
            await child.wait(_CANCELLED_S)  # who gave it up may rely on its being gone
            raise
        if said == STARTED:
            return child
        child.send(signal.SIGKILL)
        raise explain(command, said, await child.wait(5.0), start_s)

    def _start(self, command: Command) -> tuple[Child, int]:
        """The watched child, and the pipe that tells how its exec went. Raises ``OSError``."""
        read_end, write_end = os.pipe()
        try:
            return self._watch(launch(command, write_end)), read_end
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)

    def _watch(self, pid: int) -> Child:
        try:
            child = Child(pid, oom=self._oom, on_gone=self._forget)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._children[pid] = child
        return child

    def _forget(self, child: Child) -> None:
        del self._children[child.pid]

    async def kill_tree(
        self,
        child: Child,
        *,
        grace_s: float,
        kill_s: float = 10.0,
        gpu_s: float = 10.0,
    ) -> KillReport:
        """End a child with everything below it, and all orphans. See ``process_kill.kill_tree``."""
        return await process_kill.kill_tree(child, self, grace_s=grace_s, kill_s=kill_s, gpu=self._gpu, gpu_s=gpu_s)

    async def kill_all(self, *, grace_s: float, kill_s: float = 10.0) -> list[KillReport]:
        """``kill_tree`` for every child at the same time. What is about to arrive is an orphan from now on."""
        self._arriving.clear()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.kill_tree(child, grace_s=grace_s, kill_s=kill_s))
                for child in list(self._children.values())
            ]
        return [task.result() for task in tasks]

    async def reap_orphans(self, *, kill_s: float = 10.0) -> tuple[Survivor, ...]:
        """After a child ended by itself: end what it left behind. Returns what could not be killed."""
        return await process_kill.reap_orphans(self, kill_s=kill_s)

    def close(self) -> None:
        """Stop watching. Ends nobody: ``kill_all`` first."""
        for child in list(self._children.values()):
            child.detach()
        self._children.clear()


def _start_time(pid: int) -> int | None:
    stat = read_stat(pid)
    return stat.start_time if stat is not None and stat.ppid == os.getpid() else None
