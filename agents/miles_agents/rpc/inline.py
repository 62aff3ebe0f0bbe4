"""Executors that use one event loop for everything: agents, controllers, simulations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class InlineExecutors:
    """The "main thread" and the "async thread" are the loop itself; order is kept."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit_main(self, job: Callable[[], None]) -> None:
        """Run on the loop, after everything submitted before."""
        self._loop.call_soon(job)

    def async_loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        return self._loop
