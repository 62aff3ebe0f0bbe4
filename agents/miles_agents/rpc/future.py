"""The future of a call. The call is under way from the moment it was made; this is where its answer arrives.

It can be awaited from any event loop and waited for (``get``) from any thread but the one that brings the answer.
It is resolved on the runtime's loop, by the node that made the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from miles_agents.rpc.errors import DeadlineExceeded, WouldDeadlock

T = TypeVar("T")
logger = logging.getLogger(__name__)


class CallFuture(Generic[T]):
    """Resolves once, with a value or an error.

    Cancelling the task that awaits it cancels the call, like any asyncio future; ``cancel`` asks for that
    explicitly and lets the future end with ``CallCancelled``, which says whether the request may have run.
    """

    __slots__ = (
        "_blocked", "_callbacks", "_cancel", "_done", "_error", "_event", "_forbidden_thread",
        "_label", "_lock", "_seen", "_value", "_waiters",
    )  # fmt: skip

    def __init__(self, label: str, cancel: Callable[[bool], None], forbidden_thread: int) -> None:
        self._label = label
        self._cancel = cancel
        self._forbidden_thread = forbidden_thread
        self._lock = threading.Lock()
        self._done = False
        self._seen = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._event: threading.Event | None = None
        self._blocked = 0  # threads in get()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._callbacks: list[Callable[[CallFuture[T]], None]] = []

    def __repr__(self) -> str:
        state = "failed" if self._error is not None else "done" if self._done else "pending"
        return f"<CallFuture {self._label} {state}>"

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            self._enlist(loop, waiter)
            try:
                yield from waiter
            except asyncio.CancelledError:
                self._forsake(waiter)
                raise
        try:
            return self._take()
        finally:
            del self  # an error's traceback leads here: no cycle that keeps the caller's frames alive

    def get(self, timeout_s: float | None = None) -> T:
        """Wait in this thread. ``timeout_s`` bounds the waiting only; the call goes on.

        Raises:
            DeadlineExceeded: not there within ``timeout_s``.
            WouldDeadlock: called on the thread that has to bring the answer.
        """
        if not self._done:
            if threading.get_ident() == self._forbidden_thread:
                raise WouldDeadlock(
                    f"get() on {self._label} would wait for ever",
                    evidence="this is the runtime's own event loop thread, which has to bring the answer",
                    advice="Await the future instead.",
                )
            if not self._wait(timeout_s):
                raise DeadlineExceeded(
                    f"{self._label} has not answered within {timeout_s} s",
                    evidence="the call is still under way; only the waiting ended",
                    advice="Wait longer, cancel the call, or look at the stack of the callee.",
                    may_have_run=True,
                )
        try:
            return self._take()
        finally:
            del self  # see __await__

    def _wait(self, timeout_s: float | None) -> bool:
        with self._lock:
            if self._done:
                return True
            if self._event is None:
                self._event = threading.Event()
            self._blocked += 1
        try:
            return self._event.wait(timeout_s)
        finally:
            with self._lock:
                self._blocked -= 1

    def done(self) -> bool:
        """Whether the answer or an error is there."""
        return self._done

    def exception(self) -> BaseException | None:
        """The error of a finished call, None if it has none or is not finished."""
        self._seen = True
        return self._error

    def cancel(self) -> bool:
        """Ask the callee to stop. False if the call is over already. The future ends when the callee confirms."""
        if self._done or self._cancel is _over:
            return False
        self._cancel(True)
        return True

    def insist(self) -> CallFuture[T]:
        """Nothing cancels the call any more: whoever awaits this and is cancelled only ends the waiting."""
        self._cancel = _over
        return self

    def add_done_callback(self, callback: Callable[[CallFuture[T]], None]) -> None:
        """Call back on the runtime's loop when done; at once if it is."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback(self)

    def set_result(self, value: T) -> None:
        """For the node that made the call."""
        self._resolve(value, None)

    def set_exception(self, error: BaseException) -> None:
        """For the node that made the call."""
        self._resolve(None, error)

    def _resolve(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            if self._done:
                return
            self._value, self._error = value, error
            self._done = True
            self._cancel = _over  # whoever cancels has a reference to this future; values may be large
            waiters, self._waiters = self._waiters, []
            callbacks, self._callbacks = self._callbacks, []
        if self._event is not None:
            self._event.set()
        for loop, waiter in waiters:
            wake(loop, waiter)
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # boundary: the caller's code; others wait for the same answer, and the node goes on
                logger.exception("a callback of %s failed", self._label)

    def _take(self) -> T:
        self._seen = True
        error = self._error
        if error is not None:
            try:
                raise error
            finally:
                del self, error  # see __await__
        value: T = self._value
        return value

    def _enlist(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
        with self._lock:
            if self._done:  # resolved on another thread since the caller looked
                waiter.set_result(None)
            else:
                self._waiters.append((loop, waiter))

    def _forsake(self, waiter: asyncio.Future[None]) -> None:
        with self._lock:
            self._waiters = [(loop, w) for loop, w in self._waiters if w is not waiter]
            alone = not self._waiters and not self._done and not self._blocked
        if alone:
            self._seen = True
            self._cancel(False)

    def __del__(self) -> None:
        if self._error is not None and not self._seen:
            logger.warning("nobody looked at the error of %s: %s", self._label, self._error)


def _over(_wait: bool) -> None:
    return


def wake(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    """Let go whoever awaits ``waiter`` on ``loop``, from any thread; nobody is there if the loop is closed."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        if not waiter.done():
            waiter.set_result(None)
        return
    with contextlib.suppress(RuntimeError):  # closed, perhaps this very moment on its own thread
        loop.call_soon_threadsafe(_set_unless_done, waiter)


def _set_unless_done(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
