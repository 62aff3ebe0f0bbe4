"""Streams: what a generator endpoint yields, or the answers of a mesh as they come, one by one.

The consumer (``CallStream``) can be iterated from any event loop (``async for``) or thread (``for``) but the one that
brings the items. The producer (``Credits``) may run ahead by ``STREAM_CREDITS`` items, then waits for the consumer.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from miles_agents.rpc.errors import WouldDeadlock, WrongVerb
from miles_agents.rpc.future import wake

T = TypeVar("T")

STREAM_CREDITS = 16
"""Items that a producer may have under way without a word of the consumer."""

_END = object()


class CallStream(Generic[T]):
    """Items in the order of their arrival; ends after the last, or with the error that ended the call.

    Leave it early with ``aclose``/``close`` (or ``async with``), or drop it: the producers are told to stop.
    """

    def __init__(
        self, label: str, cancel: Callable[[], None], consumed: Callable[[int], None], forbidden_thread: int
    ) -> None:
        self._label = label
        self._cancel = cancel
        self._consumed = consumed
        self._forbidden_thread = forbidden_thread
        self._condition = threading.Condition()
        self._items: deque[tuple[int, Any]] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def __repr__(self) -> str:
        return f"<CallStream {self._label} {'ended' if self._ended else 'open'}>"

    def __await__(self) -> NoReturn:
        """Refused: there are many items to wait for, not one."""
        self.close()
        raise WrongVerb(
            f"{self._label} was awaited",
            evidence="it is a generator endpoint: it yields items, one by one",
            advice="Iterate: `async for item in ...` on a loop, `for item in ...` on a thread.",
        )

    def __aiter__(self) -> CallStream[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            item = self._pop()
            if item is _END:
                raise StopAsyncIteration
            if item is not None:
                return self._deliver(item)
            await self._wait_async()

    async def __aenter__(self) -> CallStream[T]:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> CallStream[T]:
        return self

    def __next__(self) -> T:
        if threading.get_ident() == self._forbidden_thread:
            raise WouldDeadlock(
                f"iterating over {self._label} would wait for ever",
                evidence="this is the runtime's own event loop thread, which has to bring the items",
                advice="Use async for.",
            )
        with self._condition:
            while not self._items and not self._ended:
                self._condition.wait()
        item = self._pop()
        if item is _END:
            raise StopIteration
        return self._deliver(item)

    async def aclose(self) -> None:
        """Stop: nothing more is wanted."""
        self.close()

    def close(self) -> None:
        """Stop: nothing more is wanted. Idempotent."""
        with self._condition:
            was_open, self._ended = not self._ended, True
            self._items.clear()
            self._error = None
            self._condition.notify_all()
        self._wake()
        if was_open:
            self._cancel()

    def put(self, position: int, item: T) -> None:
        """For the node that made the call. ``position``: whom to credit once the item is consumed."""
        with self._condition:
            if self._ended:
                return
            self._items.append((position, item))
            self._condition.notify()
        self._wake()

    def finish(self, error: BaseException | None = None) -> None:
        """For the node that made the call: nothing follows; items that came before are still handed out."""
        with self._condition:
            if not self._ended:
                self._ended = True
                self._error = error
            self._condition.notify_all()
        self._wake()

    def _pop(self) -> Any:
        with self._condition:
            if self._items:
                return self._items.popleft()
            if not self._ended:
                return None
            error, self._error = self._error, None
        if error is not None:
            raise error
        return _END

    def _deliver(self, positioned: tuple[int, Any]) -> T:
        position, item = positioned
        self._consumed(position)
        value: T = item
        return value

    async def _wait_async(self) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._condition:
            if self._items or self._ended:
                return
            self._waiters.append((loop, waiter))
        await waiter

    def _wake(self) -> None:
        with self._condition:
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            wake(loop, waiter)


class StreamStopped(BaseException):
    """The consumer left: unwinds a producer that waits for credit. Never leaves the host."""


class Credits:
    """The producer's allowance, for a generator on a thread or on a loop."""

    def __init__(self, initial: int = STREAM_CREDITS) -> None:
        self._condition = threading.Condition()
        self._left = initial
        self._stopped = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def grant(self, count: int) -> None:
        """The consumer took ``count`` items."""
        with self._condition:
            self._left += count
            self._condition.notify_all()
        self._wake()

    def stop(self) -> None:
        """The consumer left."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._wake()

    def take(self) -> None:
        """Wait on this thread for the right to send one item. Raises StreamStopped."""
        with self._condition:
            while self._left <= 0 and not self._stopped:
                self._condition.wait()
            self._spend()

    async def take_async(self) -> None:
        """Wait on this loop for the right to send one item. Raises StreamStopped."""
        while True:
            with self._condition:
                if self._left > 0 or self._stopped:
                    self._spend()
                    return
                loop = asyncio.get_running_loop()
                waiter: asyncio.Future[None] = loop.create_future()
                self._waiter = (loop, waiter)
            await waiter

    def _spend(self) -> None:
        if self._stopped:
            raise StreamStopped
        self._left -= 1

    def _wake(self) -> None:
        waiting, self._waiter = self._waiter, None
        if waiting is not None:
            wake(*waiting)
