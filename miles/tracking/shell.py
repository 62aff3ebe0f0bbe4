"""A tracker on a thread of its own. What it raises is told once and tried again; how long it takes is its business.

Consumes: records by ``put``, from any thread. Produces: calls of the tracker, lines for the terminal. Waits for: the
tracker, without a deadline of its own: whoever ends it (``join``) has one. Invariant: ``put`` neither waits nor raises.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from miles.tracking.delivery import FIRST_PAUSE_S, KEPT, Delivery
from miles.tracking.secrets import without_credentials
from miles.tracking.tracker import Begun, Examples, Outcome, Point, RunInfo, Tracker, TrackerUnusable
from miles_agents.errors import MilesError

logger = logging.getLogger(__name__)
Record: TypeAlias = Point | Examples | Path
Say: TypeAlias = Callable[[str], None]

QUEUE_LIMIT = 1000


class TrackerThread:
    """Runs one tracker.

    Args:
        name: The tracker's.
        make: Makes it, on the thread: its library is imported there.
        run: What it is told of the run.
        before: What it remembered of an earlier run that this one continues.
        say: Takes lines for the terminal; called on the thread.
        began: Takes what ``begin`` found; called on the thread.
        limit: How many records may wait.
        pause_s: After the first failure.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        run: RunInfo,
        before: Mapping[str, Any],
        *,
        say: Say,
        began: Callable[[Begun], None],
        limit: int = QUEUE_LIMIT,
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.name = name
        self._make = make
        self._run_info = run
        self._before = before
        self._say = say
        self._began = began
        self._tracker: Tracker | None = None
        self._queue: Delivery[Record | RunInfo] = Delivery(name, limit, pause_s)
        self._queue.put(run)
        self._outcome: Outcome | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Let the tracker record this when its turn comes."""
        with self._wake:
            said = self._queue.put(record)
            self._wake.notify()
        self._tell(said)

    def end(self, outcome: Outcome) -> None:
        """Let it finish when everything is recorded. Does not wait."""
        with self._wake:
            self._queue.end()
            self._outcome = outcome
            self._wake.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait until it has finished; False: it has not in time, and is told."""
        self._thread.join(max(0.0, timeout_s))
        if not self._thread.is_alive():
            return True
        with self._wake:
            waiting = self._queue.waiting
        self._say(f"{self.name} has not finished in time: {waiting} records are not sent. {KEPT}")
        return False

    # -- on the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (record := self._next()) is not None:
            try:
                self._deliver(record)
            except TrackerUnusable as error:
                with self._wake:
                    said = self._queue.give_up(_one_line(error))
            except Exception as error:  # boundary: a tracker's library
                logger.warning("%s failed", self.name, exc_info=True)
                with self._wake:
                    said = self._queue.failed(time.monotonic(), _one_line(error))
            else:
                with self._wake:
                    said = self._queue.done()
            self._tell(said)
        self._finish()

    def _next(self) -> Record | RunInfo | None:
        """Waits for something to do; None: nothing more will come."""
        with self._wake:
            while True:
                record, pause = self._queue.due(time.monotonic())
                if record is not None:
                    return record
                if self._outcome is not None and not self._queue.waiting:
                    return None
                self._wake.wait(pause)

    def _deliver(self, record: Record | RunInfo) -> None:
        if isinstance(record, RunInfo):
            tracker = self._tracker = self._tracker or self._make()
            begun = tracker.begin(record, self._before)
            self._began(begun)
            return
        tracker = self._needed()
        if isinstance(record, Point):
            tracker.log(record)
        elif isinstance(record, Examples):
            tracker.examples(record)
        else:
            tracker.artefact(record)

    def _needed(self) -> Tracker:
        if self._tracker is None:
            raise AssertionError("begin is delivered before everything else")
        return self._tracker

    def _finish(self) -> None:
        if self._queue.is_given_up or self._tracker is None or self._outcome is None:
            return
        try:
            last_word = self._tracker.finish(self._outcome)
        except Exception as error:  # boundary: a tracker's library
            logger.warning("%s failed to finish", self.name, exc_info=True)
            self._say(f"{self.name} failed to finish: {_one_line(error)}. {KEPT}")
            return
        self._tell([last_word] if last_word else [])
        if self._queue.lost:
            self._say(f"{self.name} lacks {self._queue.lost} records. {KEPT}")

    def _tell(self, said: list[str]) -> None:
        for line in said:
            self._say(line)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MilesError):
        text = f"{error.what} ({error.evidence}). {error.advice}" if error.evidence else f"{error.what}. {error.advice}"
    else:
        text = f"{type(error).__name__}: {error}"
    return without_credentials(" ".join(text.split()))[:500].rstrip(". ")
