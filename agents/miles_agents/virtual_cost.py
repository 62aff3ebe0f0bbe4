"""What one party of a simulation costs: CPU time of its callbacks, on a virtual clock, among thousands of others.

A simulated cluster runs in one thread, so a profiler's total says little of the controller. Here the controller's
callbacks are known by their context: everything that is scheduled from inside of an account (tasks, timers, callbacks
of futures) inherits it, as context variables do, and messages enter it by ``CpuAccount.run``. The thread's CPU clock is
read when an account is entered and left; other processes of the machine do not count.

Not booked: what stands in for other machines (agents, workers, the network between), and garbage collection, which
here walks the objects of all machines. With ``takes_time`` the virtual clock moves on by what was booked, as if this
party alone were slow and all others infinitely fast: waiting in its queue then shows in latencies. Such a run does not
repeat exactly.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from time import thread_time
from typing import Any, TypeVar, TypeVarTuple

from miles_agents.virtual_time import VirtualLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_account: ContextVar[CpuAccount | None] = ContextVar("miles_cpu_account", default=None)


class CpuAccount:
    """The CPU time of one party. Use it as a context manager, on a ``CostedLoop``.

    Args:
        takes_time: Move the virtual clock on by what is booked.

    Attributes:
        seconds: CPU seconds so far.
        callbacks: How often it was entered.
    """

    def __init__(self, *, takes_time: bool = False) -> None:
        self.seconds = 0.0
        self.callbacks = 0
        self.collecting_s = 0.0
        self._takes_time = takes_time
        self._began: float | None = None
        self._loop = asyncio.get_running_loop()
        self._gc_began: float | None = None
        self._context = copy_context()
        self._context.run(_account.set, self)
        self._elsewhere = Context()

    def __enter__(self) -> CpuAccount:
        gc.callbacks.append(self._on_collection)
        return self

    def __exit__(self, *_error: object) -> None:
        gc.callbacks.remove(self._on_collection)

    def run(self, callback: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call and book it. Inside of a booked call it is a plain call."""
        if self._began is not None:
            return callback(*args)
        self.callbacks += 1
        self._began = thread_time()
        try:
            return callback(*args)
        finally:
            self._book()
            self._began = None

    def enter(self, callback: Callable[[*Ts], T], *args: *Ts) -> T:
        """From outside of the account: call, book it and all that comes of it."""
        return self._context.copy().run(lambda: self.run(callback, *args))

    def leave(self, callback: Callable[[*Ts], T], *args: *Ts) -> T:
        """From inside of the account: call without booking it or what comes of it."""
        began = self._began
        if began is not None:
            self._book()
            self._began = None
        try:
            return self._elsewhere.copy().run(callback, *args)
        finally:
            if began is not None:
                self._began = thread_time()

    def task(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task that is booked from its first step on."""
        return self._loop.create_task(work, name=name, context=self._context.copy())

    def _book(self) -> None:
        assert self._began is not None
        spent = thread_time() - self._began
        self.seconds += spent
        if self._takes_time and isinstance(self._loop, VirtualLoop):
            self._loop.spend(spent)

    def _on_collection(self, phase: str, _info: dict[str, int]) -> None:
        if self._began is None:
            return
        if phase == "start":
            self._gc_began = thread_time()
        elif self._gc_began is not None:
            took = thread_time() - self._gc_began
            self._gc_began = None
            self.collecting_s += took
            self._began += took


class CostedLoop(VirtualLoop):
    """A virtual loop that enters the account of each callback that was scheduled from inside of one."""

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """See ``asyncio``."""
        account = _account.get() if context is None else context.get(_account)
        if account is None:
            return super().call_soon(callback, *args, context=context)
        return super().call_soon(account.run, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """There is one thread."""
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See ``asyncio``."""
        account = _account.get() if context is None else context.get(_account)
        if account is None:
            return super().call_at(when, callback, *args, context=context)
        return super().call_at(when, account.run, callback, *args, context=context)


def run_costed(main: Coroutine[Any, Any, T], *, limit_s: float | None = 3600.0) -> T:
    """``run_virtual`` on a ``CostedLoop``."""
    with asyncio.Runner(loop_factory=lambda: CostedLoop(limit_s=limit_s)) as runner:
        return runner.run(main)
