"""``trace.json``: what the parts of a run did when, for https://ui.perfetto.dev and Chrome's ``about:tracing``.

The file is an array of trace events and complete after each write, also if the run is killed: new events are written
over the closing bracket, with a new one behind them, in one system call.

Consumes spans; waits for the disk only. Invariant: a disk that is full ends no run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from miles.utils.spans import Span

logger = logging.getLogger(__name__)
FILE_NAME = "trace.json"
LOOP, GENERATE, EVALUATE, TRAINER, ENGINES = "loop", "generate", "evaluate", "rank 0", "requests"
TRACKS = {
    LOOP: ("controller", 1, 1),
    GENERATE: ("controller", 1, 2),
    EVALUATE: ("controller", 1, 3),
    TRAINER: ("trainer", 2, 1),
    ENGINES: ("engines", 3, 1),
}
"""By name: the process it stands under, that one's number, and its own there."""
_BEGIN, _END = b"[\n", b"\n]\n"


class TraceFile:
    """See the module's docstring. A run that goes on in its directory goes on in the file.

    Args:
        run_dir: Where it is.
        say: Takes a line for the terminal.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = logger.warning) -> None:
        self.path = run_dir / FILE_NAME
        self._say = say
        self._descriptor = -1
        self._size = 0
        """Bytes before the closing bracket."""
        self._is_over = False

    def add(self, track: str, spans: Iterable[Span]) -> None:
        """Spans of a track."""
        _, process, thread = TRACKS[track]
        events = [_event(span, process, thread) for span in spans]
        if self._descriptor < 0 and events and not self._is_over:
            self._open()
        self._append(events)

    def close(self) -> None:
        """Close the file; nothing is added any more."""
        self._is_over = True
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = _size_of_whole(self._descriptor)
            if self._size == 0:
                os.ftruncate(self._descriptor, 0)
                self._append(_names())
        except OSError as error:
            self._give_up(error)

    def _append(self, events: list[dict[str, Any]]) -> None:
        if self._descriptor < 0 or not events:
            return
        lines = b",\n".join(json.dumps(event).encode() for event in events)
        text = (b",\n" if self._size else _BEGIN) + lines
        try:
            if os.pwrite(self._descriptor, text + _END, self._size) < len(text) + len(_END):
                raise OSError("the disk took a part of it only")
            self._size += len(text)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """What is there stays, whole."""
        self._say(f"{self.path} is not written any more: {error}. The run goes on")
        try:
            if self._descriptor >= 0 and self._size:
                os.pwrite(self._descriptor, _END, self._size)
                os.ftruncate(self._descriptor, self._size + len(_END))
        except OSError:
            logger.warning("%s is not whole", self.path)
        self.close()


def _size_of_whole(descriptor: int) -> int:
    """Bytes before the closing bracket of a file that we wrote; 0: it is none."""
    size = os.fstat(descriptor).st_size
    if size < len(_BEGIN) + len(_END) or os.pread(descriptor, len(_BEGIN), 0) != _BEGIN:
        return 0
    return size - len(_END) if os.pread(descriptor, len(_END), size - len(_END)) == _END else 0


def _names() -> list[dict[str, Any]]:
    named = {}
    for track, (process, pid, tid) in TRACKS.items():
        named[pid, 0] = {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": process}}
        named[pid, tid] = {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": track}}
    return [named[key] for key in sorted(named)]


def _event(span: Span, process: int, thread: int) -> dict[str, Any]:
    name, begin, end, arguments = span
    times = {"ts": round(begin * 1e6), "dur": max(0, round((end - begin) * 1e6))}
    return {"name": name, "ph": "X", "pid": process, "tid": thread, **times, "args": arguments}
