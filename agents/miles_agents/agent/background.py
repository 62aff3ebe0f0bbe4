"""The tasks of one life of an agent: what one of them raises is logged, and costs none of the others anything.

A task group would end them all, and refuse the tasks that are needed to end the workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)
_CLOSE_S = 1.0


class Background:
    """Started with ``create_task``; those that still run are cancelled by ``close``."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def create_task(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run it; a failure is logged."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed; everything else goes on", task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel what still runs. What does not heed that soon is left to the end of the process."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)
