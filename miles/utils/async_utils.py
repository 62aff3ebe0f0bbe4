"""Running a coroutine from ordinary code: on a loop thread, never on the caller's.

In the rollout manager that is the loop of user code; elsewhere, a loop that is started on first use.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from miles_agents.errors import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class WouldBlockLoop(ConfigError):
    """Waiting here would stop the loop that the awaited coroutine needs."""

    code = "E-HOOK-004"


class LoopThread:
    """A daemon thread with an event loop of its own. ``stop`` cancels what runs on it and ends the thread."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop or asyncio.new_event_loop()
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not self._stopping:
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):  # of a task that nobody awaits: it must not end the others
                    logger.exception("a task on thread %s wanted to end the process", self.thread.name)
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run it there and wait for it on this thread, which must not be the loop's.

        Raises:
            WouldBlockLoop: It is.
        """
        if threading.current_thread() is self.thread:
            coroutine.close()
            raise WouldBlockLoop(
                "a coroutine is waited for on the thread of the loop that should run it",
                evidence=f"on thread {self.thread.name}",
                advice="Make the function async and await the coroutine.",
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    async def submit(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it there and await it on this loop. Cancelling here cancels there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End it. False if what runs on it did not let it end in time; the thread is left to the process's end."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self._wind_up()))
            self.thread.join(timeout_s)
        return not self.thread.is_alive()

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=2.0) if others else None
        self._stopping = True
        self.loop.stop()


_lock = threading.Lock()
_current: LoopThread | None = None
_own: LoopThread | None = None


def set_loop_thread(thread: LoopThread | None) -> None:
    """Where ``run`` runs from now on; None: on a thread of its own."""
    global _current
    with _lock:
        _current = thread


def get_loop_thread() -> LoopThread:
    """Where ``run`` runs."""
    global _own
    with _lock:
        if _current is not None:
            return _current
        if _own is None or not _own.thread.is_alive():
            _own = LoopThread("miles-async")
        return _own


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop thread and wait for it. From ordinary functions; async ones await."""
    return get_loop_thread().run(coro)


def stop_loop_thread() -> None:
    """End the thread that ``run`` started, if it did."""
    global _own
    with _lock:
        thread, _own = _own, None
    if thread is not None:
        thread.stop()
