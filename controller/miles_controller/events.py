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

from miles_agents.run_files import UnusableRunDirectory
from miles_controller.event_file import EventFile

logger = logging.getLogger(__name__)
_HISTORY = 1000
_SUBSCRIBER_QUEUE = 10_000
_CLOSE_S = 2.0
WARNINGS = frozenset(
    {
        "background_failed", "call_overdue", "close_failed", "mesh_failed", "mesh_not_ended", "node_dead",
        "node_left_behind", "node_provider_failed", "node_refused", "node_suspect", "object_lost", "service_failed",
        "store_full", "worker_died", "worker_silent",
    }
)  # fmt: skip
"""Kinds of events that somebody should know of."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``kind`` is a word (``worker_died``), ``subject`` whom it concerns."""

    kind: str
    subject: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


class EventLog:
    """Takes events, keeps the last 1,000, writes all. Subscribers that fall 10,000 behind lose the oldest.

    Telling never fails and never waits, so that it can stand in the middle of anything; ``num_lost`` counts what the
    file could not take. Raises UnusableRunDirectory if there cannot be a file.
    """

    def __init__(self, path: Path | None) -> None:
        self.history: deque[Event] = deque(maxlen=_HISTORY)
        self._subscribers: set[asyncio.Queue[Event]] = set()
        self._listeners: list[Callable[[Event], None]] = []
        self._num_unlogged = 0
        try:
            self._file = None if path is None else EventFile(path)
        except OSError as error:
            raise UnusableRunDirectory.because(path or Path(), error) from None

    def emit(self, kind: str, subject: str, text: str, **fields: Any) -> None:
        """Something happened."""
        event = Event(kind, subject, text, fields)
        self.history.append(event)
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:  # boundary: listeners are the embedder's
                logger.exception("a listener of events failed")
        try:
            logger.log(logging.WARNING if kind in WARNINGS else logging.INFO, "%s: %s", subject, text)
        except Exception:  # noqa: BLE001  boundary: handlers are the embedder's
            self._num_unlogged += 1
        if self._file is not None:
            self._write(self._file, event)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call this with every event from now on, at once; it must not block. What it raises is logged."""
        self._listeners.append(listener)

    @property
    def num_lost(self) -> int:
        """Events that did not come into the file or the log."""
        return self._num_unlogged + (self._file.num_lost if self._file is not None else 0)

    def _write(self, file: EventFile, event: Event) -> None:
        try:
            line = json.dumps(asdict(event), default=str)
        except Exception as error:  # noqa: BLE001  boundary: fields may hold anything
            file.lost(f"an event of kind {event.kind} cannot be written as JSON: {error!r}")
        else:
            file.put(line)

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
        """Close the file; what a stalled disk does not take within seconds is given up. Idempotent."""
        file, self._file = self._file, None
        if file is not None and not file.close(timeout_s=_CLOSE_S):
            logger.warning("the file of events was not written to its end: its disk does not answer")
