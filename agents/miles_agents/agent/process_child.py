"""One child process: watched through its pidfd, so that its end is known within milliseconds and exactly once.

Consumes: readiness of the pidfd on the event loop. Produces: ``exited``. Waits for nothing.
Invariants: a signal never reaches a reused pid (the pidfd names the process; its group is signalled only while the
child is not reaped, for so long the kernel keeps the number); nobody else reaps it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from miles_agents.agent.process_exit import Exit, OomWatch, exit_of
from miles_agents.agent.process_tree import ProcessId, read_stat

TRACED_ZOMBIE_POLL_S = 0.05


class Child:
    """A process that ``ProcessTable`` started. Its process group and session have its pid as their number."""

    def __init__(self, pid: int, *, oom: OomWatch, on_gone: Callable[[Child], None]) -> None:
        """Start to watch an unreaped child. Raises ``OSError`` if there is no descriptor left for it."""
        self.pid = pid
        self.exit: Exit | None = None
        self._oom = oom
        self._on_gone = on_gone
        self._killed_by_us = False
        self._retry: asyncio.TimerHandle | None = None
        self._pidfd = os.pidfd_open(pid)
        stat = read_stat(pid)
        self.start_time = stat.start_time if stat is not None else 0
        """Clock ticks since boot, field 22 of /proc/<pid>/stat."""
        self.tree: dict[ProcessId, None] = {self.id: None}
        """It, and what was seen below it when it was killed; ordered, without repeats."""
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = self._loop.create_future()
        """Resolves when the child has been reaped. Never fails. Do not cancel it; see ``wait``."""
        self._loop.add_reader(self._pidfd, self._on_readable)

    @property
    def id(self) -> ProcessId:
        """Pid and start time."""
        return ProcessId(self.pid, self.start_time)

    def send(self, number: int) -> bool:
        """Signal the process alone. False: it has ended."""
        if self.exit is not None:
            return False
        self._killed_by_us |= number == signal.SIGKILL
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def send_group(self, number: int) -> bool:
        """Signal the process and everything that stayed in its group, at once. False: it has ended."""
        if self.exit is not None:
            return False
        self._killed_by_us |= number == signal.SIGKILL
        return self._signal_group(number)

    def _signal_group(self, number: int) -> bool:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # nobody, or only processes that changed their user
            return False
        return True

    def state(self) -> str | None:
        """The kernel's state letter (R, S, D, T, t, Z, ...), or None once it is reaped."""
        if self.exit is not None:
            return None
        stat = read_stat(self.pid)
        return stat.state if stat is not None else None

    def stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it: it will not answer, but it is not dead."""
        return self.state() in ("T", "t")

    def describe(self) -> str:
        """``running (state S)``, or how it ended."""
        return self.exit.describe() if self.exit is not None else f"running (state {self.state()})"

    async def wait(self, timeout_s: float | None = None) -> Exit | None:
        """How it ended, or None if it still runs after ``timeout_s``. Cancelling the caller harms nobody else."""
        await asyncio.wait({self.exited}, timeout=timeout_s)
        return self.exit

    def detach(self) -> None:
        """Stop watching. The process goes on, and ``exited`` stays unresolved. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_readable(self) -> None:
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody else reaped it, against the rules
            self._finish(Exit(code=None, signal=None))
            return
        if info is None:
            # Dead, but a debugger is attached and has to be told first. The pidfd stays readable meanwhile.
            self._loop.remove_reader(self._pidfd)
            self._retry = self._loop.call_later(TRACED_ZOMBIE_POLL_S, self._watch_again)
            return
        # Not reaped yet, so its number still means its group: end what stayed there, in one step that no fork
        # escapes. What left the group is adopted by this process and found by ``reap_orphans``.
        self._signal_group(signal.SIGKILL)
        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        killed = info.si_code != os.CLD_EXITED and info.si_status == signal.SIGKILL
        oom = self._oom.on_exit(killed_by_stranger=killed and not self._killed_by_us, now=self._loop.time())
        self._finish(exit_of(info, oom=oom))

    def _watch_again(self) -> None:
        self._loop.add_reader(self._pidfd, self._on_readable)

    def _finish(self, how: Exit) -> None:
        self.detach()
        self.exit = how
        self._on_gone(self)
        if not self.exited.done():
            self.exited.set_result(how)
