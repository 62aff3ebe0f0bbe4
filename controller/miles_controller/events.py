"""What happened, for programs: a bounded history, subscribers, and a JSONL file in the run directory."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_HISTORY = 1000
_SUBSCRIBER_QUEUE = 10_000
_WARNINGS = frozenset(
    {"node_suspect", "node_dead", "worker_died", "worker_silent", "mesh_failed", "call_overdue", "service_failed"}
)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``kind`` is a word (``worker_died``), ``subject`` whom it concerns."""

    kind: str
    subject: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


class EventLog:
    """Takes events, keeps the last 1,000, writes all. Subscribers that fall 10,000 behind lose the oldest."""

    def __init__(self, path: Path | None) -> None:
        self.history: deque[Event] = deque(maxlen=_HISTORY)
        self._subscribers: set[asyncio.Queue[Event]] = set()
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def emit(self, kind: str, subject: str, text: str, **fields: Any) -> None:
        """Something happened."""
        event = Event(kind, subject, text, fields)
        self.history.append(event)
        logger.log(logging.WARNING if kind in _WARNINGS else logging.INFO, "%s: %s", subject, text)
        if self._file is not None:
            self._file.write(json.dumps(asdict(event), default=str) + "\n")
            self._file.flush()
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    async def subscribe(self, *kinds: str) -> AsyncIterator[Event]:
        """Events from now on, of these kinds (all by default), until the iteration is left."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_SUBSCRIBER_QUEUE)
        self._subscribers.add(queue)
        try:
            while True:
                event = await queue.get()
                if not kinds or event.kind in kinds:
                    yield event
        finally:
            self._subscribers.discard(queue)

    async def wait_for(self, predicate: Callable[[Event], bool], *, timeout_s: float) -> Event:
        """The first event, past (as far as remembered) or future, that fits. Raises TimeoutError."""
        for event in self.history:
            if predicate(event):
                return event
        queue: asyncio.Queue[Event] = asyncio.Queue(_SUBSCRIBER_QUEUE)
        self._subscribers.add(queue)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    event = await queue.get()
                    if predicate(event):
                        return event
        finally:
            self._subscribers.discard(queue)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
