"""What the loop of an embedded job tells, as events for any number of listeners. Nothing is printed or logged.

Consumes: the loop's story, the controller's events. Produces: ``JobEvent``s. Waits for: nothing; a listener that is
slow loses its oldest events, and is told how many. Invariant: ``Ended`` is the last event of every listener, also of
one that begins to listen later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from miles.tracking.narrator import Narrator
from miles_controller import Controller
from miles_controller.events import WARNINGS, Event
from miles_launcher.job_events import (
    Ended,
    Evaluated,
    JobEvent,
    Missed,
    NodeJoined,
    NodeLost,
    Phase,
    Progress,
    Recovered,
    Said,
    Saved,
    Step,
    Trouble,
)
from miles_launcher.job_values import Checkpoint, State

KEPT = 1000
"""Events that a later listener gets of the time before; progress is not among them."""
QUEUE = 10_000


class Feed:
    """One listener's events."""

    def __init__(self, before: deque[JobEvent], limit: int = QUEUE) -> None:
        self._events = deque(before)
        self._limit = limit
        self._missed = 0
        self._more = asyncio.Event()
        self._more.set()

    def put(self, event: JobEvent) -> None:
        """From the job."""
        if len(self._events) >= self._limit:
            self._events.popleft()
            self._missed += 1
        self._events.append(event)
        self._more.set()

    async def next(self) -> JobEvent:
        """The next one, when there is one."""
        while not self._events and not self._missed:
            self._more.clear()
            await self._more.wait()
        if self._missed:
            count, self._missed = self._missed, 0
            return Missed(count)
        return self._events.popleft()


class JobNarrator(Narrator):
    """See the module's docstring. ``moved``: called with the job's new state."""

    def __init__(self, moved: Callable[[State], None]) -> None:
        super().__init__()
        self.saved_checkpoints: list[Checkpoint] = []
        self.exports: list[Checkpoint] = []
        self._moved = moved
        self._history: deque[JobEvent] = deque(maxlen=KEPT)
        self._feeds: set[Feed] = set()

    def emit(self, event: JobEvent) -> None:
        """Tell all listeners."""
        if not isinstance(event, Progress):
            self._history.append(event)
        for feed in self._feeds:
            feed.put(event)

    def listen(self) -> Feed:
        """A new listener, which has what was told before."""
        feed = Feed(self._history)
        self._feeds.add(feed)
        return feed

    def leave(self, feed: Feed) -> None:
        """It listens no more."""
        self._feeds.discard(feed)

    @property
    def has_bars(self) -> bool:
        """Progress is asked for while somebody listens."""
        return bool(self._feeds)

    def say(self, text: str) -> None:
        """A line."""
        self.emit(Said(text))

    def attached(self, controller: Controller) -> None:
        """The controller listens."""
        super().attached(controller)
        controller.events.listen(self._on_event)
        self._moved("nodes")

    def detached(self) -> None:
        """The controller ends now."""
        super().detached()
        self._moved("ending")

    def phase_changed(self) -> None:
        """Told as an event; the start is a state of the job, too."""
        if self.progress.phase == "start":
            self._moved("starting")
        elif self.progress.num_rollout or self.progress.phase != "nodes":
            self._moved("running")
        self.emit(Phase(self.progress.phase))

    def show(self, news: Mapping[str, Any]) -> None:
        """How far a phase is."""
        super().show(news)
        progress = self.progress
        self.emit(Progress(progress.phase, progress.finished, progress.target, progress.tokens))

    def measured(self, rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> None:
        """An iteration is done."""
        super().measured(rollout_id, num_rollout, metrics)
        self.emit(Step(rollout_id, num_rollout, dict(metrics)))

    def evaluated(self, rollouts_done: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self.emit(Evaluated(rollouts_done, dict(metrics)))

    def saved(self, rollout_id: int, path: str) -> None:
        """A checkpoint is complete."""
        self.saved_checkpoints.append(_checkpoint(rollout_id, path))
        self.emit(Saved("checkpoint", rollout_id, path))

    def exported(self, rollout_id: int, path: str) -> None:
        """An export is complete."""
        self.exports.append(_checkpoint(rollout_id, path))
        self.emit(Saved("hf", rollout_id, path))

    def _on_event(self, event: Event) -> None:
        if event.kind == "node_joined":
            self.emit(NodeJoined(event.subject, event.text))
        elif event.kind == "node_dead" or (event.kind == "node_gone" and not self._is_dismissed(event.subject)):
            self.emit(NodeLost(event.subject, event.text))
        elif event.kind == "recovered":
            fields = event.fields
            told = Recovered(event.subject, event.text, str(fields.get("cause", "")), float(fields.get("seconds", 0.0)))
            self.emit(told)
        elif event.kind in WARNINGS:
            self.emit(Trouble(event.kind, event.subject, event.text))

    def _is_dismissed(self, node: str) -> bool:
        return self.controller is None or node in self.controller.fabric.dismissed

    def ended(self, event: Ended) -> None:
        """The last event."""
        self.emit(event)


def _checkpoint(rollout_id: int, path: str) -> Checkpoint:
    return Checkpoint(rollout_id, Path(path))
