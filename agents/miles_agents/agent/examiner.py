"""Answers the controller's questions about this node (``miles_agents.probe``), off the event loop.

Each question has a daemon thread of its own: looking at a disk or a driver may hang, and a thread that hangs must keep
neither the agent's loop nor its end waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping
from typing import Any

from miles_agents.probe import Probe

MOST_AT_ONCE = 8
"""Threads; a controller that asks while so many hang is told so."""


class Examiner:
    """The probe of one agent."""

    def __init__(self) -> None:
        self._probe = Probe()
        self._asked = 0

    async def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. The caller's deadline bounds the wait; the thread goes on until its question ends."""
        if self._asked >= MOST_AT_ONCE:
            return {"error": f"{self._asked} earlier questions have not ended"}
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[dict[str, Any]] = loop.create_future()

        def settle(value: dict[str, Any]) -> None:
            self._asked -= 1
            if not answered.done():
                answered.set_result(value)

        def work() -> None:
            value = self._probe.answer(question)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, value)

        self._asked += 1
        threading.Thread(target=work, name="examiner", daemon=True).start()
        return await answered

    def close(self) -> None:
        """Its listeners close."""
        self._probe.close()
