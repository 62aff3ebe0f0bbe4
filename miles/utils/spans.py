"""What took how long, for the trace of a run: spans that a process remembers until somebody asks for them.

A span is ``(name, begin, end, arguments)``; times are seconds since the epoch, so that those of several processes fit
together. Imports nothing of ours.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

Span: TypeAlias = tuple[str, float, float, dict[str, Any]]

MOST = 20_000
"""So many are remembered; of more, the oldest are lost."""
_GAP_S = 0.01


class SpanLog:
    """Spans since the last ``take``. Any thread may add."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MOST)

    def add(self, name: str, begin: float, end: float, **arguments: Any) -> None:
        """Remember one that is over."""
        self._spans.append((name, begin, end, arguments))

    def take(self) -> list[Span]:
        """All, oldest first, which are forgotten."""
        return [self._spans.popleft() for _ in range(len(self._spans))]


class BusyLog:
    """Times in which at least one thing is under way. Gaps below 10 ms are none.

    Args:
        name: Of the spans. Their arguments: ``begun``, how many things began in them, and ``most`` at the same time.
        clock: Seconds since the epoch.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.time) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=MOST)
        self._count = self._begun = self._most = 0
        self._since = 0.0

    def begin(self) -> None:
        """One more is under way."""
        with self._lock:
            if self._count == 0:
                self._open(self._clock())
            self._count += 1
            self._begun += 1
            self._most = max(self._most, self._count)

    def end(self) -> None:
        """One less is."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._close(self._clock())

    def take(self) -> list[Span]:
        """All until now: what is under way still is cut here, and goes on in the next ones."""
        with self._lock:
            if self._count:
                now = self._clock()
                self._close(now)
                self._since, self._begun, self._most = now, 0, self._count
            taken = list(self._spans)
            self._spans.clear()
            return taken

    def _open(self, now: float) -> None:
        self._since, self._begun, self._most = now, 0, 0
        if self._spans and now - self._spans[-1][2] < _GAP_S:
            _, self._since, _, before = self._spans.pop()
            self._begun, self._most = before["begun"], before["most"]

    def _close(self, now: float) -> None:
        self._spans.append((self._name, self._since, now, {"begun": self._begun, "most": self._most}))
