"""``python -m miles.tracking.host NAME...``: the process of the trackers, with a thread for each.

Their libraries are large, start processes, threads and exit handlers of their own, write to the terminal, and may hang:
here all of that is nobody's problem but theirs. Orders come as JSON lines on stdin:

    {"do": "begin", "run": {...}, "before": {tracker: {...}}, "limits": {tracker: n}}
    {"do": "log", "steps": {...}, "metrics": {...}, "time": ...}
    {"do": "examples", "step": ..., "rows": [...]}
    {"do": "artefact", "path": ...}
    {"do": "finish", "outcome": ..., "timeout_s": ...}

Answers on stdout: ``{"say": line}`` for the terminal, ``{"began": tracker, "remembered": {...}}``, and at the
end ``{"finished": true}``. The end of stdin without ``finish`` means that the controller is gone: the run is marked as
failed. What libraries write goes to stderr, which is a file of the run directory.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from miles.tracking.shell import QUEUE_LIMIT, TrackerThread
from miles.tracking.tracker import Begun, Examples, Outcome, Point, RunInfo, Tracker
from miles.tracking.trackers import KINDS, make
from miles_agents.runtime_dir import runtime_dir

ORPHANED_S = 20.0
"""Deadline of finishing when the controller is gone."""

Write = Callable[[Mapping[str, Any]], None]


class Host:
    """Carries orders out.

    Args:
        makers: How each tracker is made.
        write: Takes answers; called on any thread.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], write: Write) -> None:
        self._makers = makers
        self._write = write
        self._threads: list[TrackerThread] = []

    def run(self, orders: Iterator[Mapping[str, Any]]) -> None:
        """Until told to finish, or until nobody is left to tell."""
        for order in orders:
            if order["do"] == "finish":
                self._finish(Outcome(order["outcome"]), order["timeout_s"])
                return
            self._obey(order)
        self._finish(Outcome("failed"), ORPHANED_S)

    def _obey(self, order: Mapping[str, Any]) -> None:
        what = order["do"]
        if what == "begin":
            self._begin(order)
        elif what == "log":
            self._put(Point(order["steps"], order["metrics"], order["time"]))
        elif what == "examples":
            self._put(Examples(order["step"], order["rows"]))
        elif what == "artefact":
            self._put(Path(order["path"]))

    def _begin(self, order: Mapping[str, Any]) -> None:
        run, limits = RunInfo(**order["run"]), order.get("limits", {})
        for name, maker in self._makers.items():
            thread = TrackerThread(
                name,
                maker,
                run,
                order["before"].get(name, {}),
                say=self._say,
                began=partial(self._began, name),
                limit=limits.get(name) or QUEUE_LIMIT,
            )
            self._threads.append(thread)

    def _put(self, record: Point | Examples | Path) -> None:
        for thread in self._threads:
            thread.put(record)

    def _began(self, name: str, begun: Begun) -> None:
        self._write({"began": name, "remembered": begun.remembered})
        self._say(begun.told)

    def _say(self, line: str) -> None:
        self._write({"say": line})

    def _finish(self, outcome: Outcome, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.end(outcome)
        for thread in self._threads:
            thread.join(deadline - time.monotonic())
        self._write({"finished": True})


def orders_of(stream: TextIO) -> Iterator[Mapping[str, Any]]:
    """The lines of a stream; a torn last one is left out."""
    for line in stream:
        if line.endswith("\n"):
            yield json.loads(line)


def writer(stream: TextIO) -> Write:
    """Writes answers as lines, from any thread. When nobody reads any more, they are dropped."""
    lock = threading.Lock()

    def write(answer: Mapping[str, Any]) -> None:
        with lock:
            try:
                stream.write(json.dumps(answer) + "\n")
                stream.flush()
            except (OSError, ValueError):
                return

    return write


def main(names: Sequence[str]) -> None:
    """Serve until the end. Leaves without exit handlers: whatever hangs, hangs no longer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to hear
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Libraries make temporary directories when they are imported, and remove them by exit handlers, if at all.
    with runtime_dir(f"trackers-{os.getpid()}") as directory:
        os.environ["TMPDIR"] = str(directory)
        for name in names:  # while engines start, and not when the first metrics wait
            _import_quietly(name)
        Host({name: partial(make, name) for name in names}, writer(answers)).run(orders_of(sys.stdin))
    sys.stderr.flush()
    os._exit(0)


def _import_quietly(name: str) -> None:
    """What it raises is raised again, and told, when the tracker is made."""
    for module in KINDS[name].packages:
        try:
            importlib.import_module(module)
        except Exception:  # boundary: a tracker's library
            logging.getLogger(__name__).warning("%s cannot be imported", module, exc_info=True)


if __name__ == "__main__":
    main(sys.argv[1:])
