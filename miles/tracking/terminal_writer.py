"""Writes to a terminal on a thread, so that one that takes nothing (Ctrl-S, a slow line) stops nobody else.

Consumes: text. Produces: the same on the terminal, in order. Waits for: the terminal, on the thread only; ``finish``
waits for that with a deadline. Invariant: ``write`` neither waits nor raises; what waits is bounded: whoever writes
much asks ``is_idle`` before, and beyond ``MAX_CHARS`` nothing is taken.
"""

from __future__ import annotations

import io
import threading
import time
from typing import TextIO

MAX_CHARS = 4 << 20


class TerminalWriter(io.TextIOBase):
    """A text file for a console. ``target`` is the terminal."""

    def __init__(self, target: TextIO) -> None:
        super().__init__()
        self._target = target
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._num_chars = 0
        self._is_writing = False
        self._is_over = False
        self._thread = threading.Thread(target=self._write_all, name="terminal", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The terminal's."""
        return self._target.encoding

    @property
    def is_idle(self) -> bool:
        """Whether the terminal has taken everything."""
        with self._changed:
            return not self._waiting and not self._is_writing

    def isatty(self) -> bool:
        """As the terminal."""
        return self._target.isatty()

    def fileno(self) -> int:
        """The terminal's: consoles ask it for its size."""
        return self._target.fileno()

    def write(self, text: str) -> int:
        """Have it written soon."""
        with self._changed:
            if self._num_chars < MAX_CHARS:
                self._waiting.append(text)
                self._num_chars += len(text)
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """The thread flushes what it writes."""

    def finish(self, timeout_s: float) -> bool:
        """Write what waits, for so long at most, and end; whether all was written. Else the thread is left behind."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                while not self._waiting and not self._is_over:
                    self._changed.wait()
                if not self._waiting:
                    return
                text = "".join(self._waiting)
                self._waiting.clear()
                self._num_chars = 0
                self._is_writing = True
            try:
                self._target.write(text)
                self._target.flush()
            except (OSError, ValueError):
                continue  # the terminal is gone; the run is not the worse for it
