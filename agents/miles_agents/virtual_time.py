"""An asyncio event loop on a clock that jumps: simulated time costs nothing and repeats exactly.

Whenever nothing is ready to run, the clock moves to the next timer instead of sleeping. A program that only
uses tasks, timers and ``loop.time()`` therefore runs as fast as its callbacks, and twice the same way.

There is no I/O here: no sockets, pipes, subprocesses or executors; asking for one raises. Threads must not be
involved either, because the clock would not wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Never, TypeVar, TypeVarTuple

from miles_agents.errors import InternalError

if TYPE_CHECKING:
    from _typeshed import HasFileno

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START_S = 1000.0
"""Virtual time at the start of every loop, seconds. Not zero, so that a forgotten ``now`` shows."""

_LISTED_TASKS = 20


class Deadlock(InternalError):
    """Nothing is ready and no timer is set: the program would wait forever."""

    code = "E-VIRT-001"


class VirtualTimeLimit(InternalError):
    """The program was not done by its limit of virtual time."""

    code = "E-VIRT-002"


class NoVirtualIO(InternalError):
    """Code on a virtual clock asked for real I/O or for a thread."""

    code = "E-VIRT-003"


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop. ``limit_s`` bounds the virtual time that may pass (None: no bound)."""

    def __init__(self, *, limit_s: float | None = None) -> None:
        super().__init__()
        self._now = START_S
        self._limit = None if limit_s is None else START_S + limit_s
        # The one thing that BaseEventLoop asks of a selector is select(timeout).
        self._selector = self

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def precise_time(self) -> float:
        """``time``: for code that would look at a finer clock where time is real."""
        return self.time()

    def spend(self, seconds: float) -> None:
        """Let time pass, as work that takes so long would: what fell due meanwhile is late."""
        self._now += seconds

    def select(self, timeout: float | None) -> list[Never]:
        """Jump instead of waiting. ``timeout`` is the distance to the next timer, 0 if something is ready.

        Raises:
            Deadlock: nothing is ready and nothing is scheduled.
            VirtualTimeLimit: the next timer lies behind the limit.
        """
        # Both lift the limit, so that the cancelled tasks can still wind down with timers of their own.
        if timeout is None:
            self._limit = None
            raise Deadlock(
                f"all tasks wait and no timer is set at virtual time {self._now:.6f}",
                evidence=describe_tasks(self),
                advice="Find the wait whose other side is gone; give it a deadline or a liveness condition.",
            )
        if timeout > 0:
            if self._limit is not None and self._now + timeout > self._limit:
                limit, self._limit = self._limit, None
                raise VirtualTimeLimit(
                    f"not done after {limit - START_S:g} virtual seconds",
                    evidence=describe_tasks(self),
                    advice="Find the task that never ends, or raise limit_s.",
                )
            self._now += timeout
        return []

    def _process_events(self, _events: list[Never]) -> None:
        """Nothing ever happens outside."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Refused: the clock would not wait for the thread."""
        raise NoVirtualIO(
            f"run_in_executor({func!r}) on a virtual clock",
            evidence="virtual time would run on while the thread works",
            advice="Put the blocking work behind an interface with an in-memory twin.",
        )

    def add_reader(self, fd: int | HasFileno, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        """Refused: there is no real I/O on a virtual clock."""
        self._refuse_fd(fd, callback)

    def add_writer(self, fd: int | HasFileno, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        """Refused: there is no real I/O on a virtual clock."""
        self._refuse_fd(fd, callback)

    def _refuse_fd(self, fd: Any, callback: Any) -> Never:
        raise NoVirtualIO(
            f"file descriptor {fd!r} watched on a virtual clock",
            evidence=f"callback {callback!r}",
            advice="Use the in-memory transport.",
        )


def run_virtual(main: Coroutine[Any, Any, T], *, limit_s: float | None = 3600.0) -> T:
    """Run ``main`` to its end on a fresh virtual clock and return its result, like ``asyncio.run``.

    Args:
        main: The program. Its clock starts at ``START_S``.
        limit_s: Virtual seconds after which the run fails; None for no limit.

    Raises:
        Deadlock: everything waits for something that cannot happen.
        VirtualTimeLimit: ``limit_s`` has passed.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s=limit_s)) as runner:
        return runner.run(main)


def describe_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """The unfinished tasks of ``loop``, each with the chain of awaits at which it stands, outermost first."""
    tasks = sorted(asyncio.all_tasks(loop), key=_by_age)
    lines = []
    for task in tasks[:_LISTED_TASKS]:
        lines.append(f"task {task.get_name()}")
        lines.extend(f"  {line}" for line in _await_chain(task.get_coro()))
    if len(tasks) > _LISTED_TASKS:
        lines.append(f"and {len(tasks) - _LISTED_TASKS} more")
    return "\n".join(lines) or "no tasks"


def _by_age(task: asyncio.Task[Any]) -> tuple[int, str]:
    """Default names are Task-1, Task-2...: shorter is older."""
    return len(task.get_name()), task.get_name()


def _await_chain(awaited: Any) -> list[str]:
    """``function (file:line)`` for each suspended frame below a coroutine, then what the last one waits for."""
    lines = []
    while awaited is not None:
        # Coroutines, generator-based coroutines and async generators name the same two things differently.
        frame: FrameType | None = None
        for prefix in ("cr", "gi", "ag"):
            code: CodeType | None = getattr(awaited, f"{prefix}_code", None)
            if code is not None:
                frame = getattr(awaited, f"{prefix}_frame", None)
                line = frame.f_lineno if frame is not None else code.co_firstlineno
                lines.append(f"{code.co_qualname} ({code.co_filename}:{line})")
                awaited = getattr(awaited, f"{prefix}_await", None) or getattr(awaited, "gi_yieldfrom", None)
                break
        else:
            lines.append(f"waits for {awaited!r}")
            break
    return lines
