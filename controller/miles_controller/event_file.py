"""The file of events: lines that a thread of its own appends, so that a slow or full disk stops nobody.

Consumes: lines. Produces: the file, and a count of the lines that it could not take. Waits for: the disk, on its own
thread only; ``close`` waits for that with a deadline. Invariants: ``put`` neither waits nor raises; a line is written
whole, or counted as lost.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)
_QUEUE = 10_000


class EventFile:
    """Appends lines to a file. Raises OSError if that cannot be opened; nothing later does."""

    def __init__(self, path: Path, *, queue_lines: int = _QUEUE) -> None:
        self.num_lost = 0
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._lines: queue.Queue[bytes | None] = queue.Queue(queue_lines)
        self._told = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write_all, name="miles-events", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Write a line some time soon."""
        try:
            self._lines.put_nowait(line.encode(errors="replace") + b"\n")
        except queue.Full:
            self.lost("it takes lines more slowly than they come")

    def lost(self, why: str) -> None:
        """A line will not be in the file: count it, and say so the first time."""
        with self._lock:
            self.num_lost += 1
            first, self._told = not self._told, True
        if first:
            logger.warning("%s misses events: %s. Make room; the run goes on, and they are counted.", self._path, why)

    def close(self, *, timeout_s: float) -> bool:
        """Write what is left, for so long at most; says whether all of it was. A stalled thread is left behind."""
        deadline = time.monotonic() + timeout_s
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        torn = b""
        while (line := self._lines.get()) is not None:
            left = torn + line
            try:
                while left:
                    left = left[os.write(self._file, left) :]
                torn = b""
            except OSError as error:
                torn = b"\n" if len(left) < len(torn + line) else torn
                self.lost(str(error))
        os.close(self._file)
