"""What simulated workers print: nothing, or more than anyone can read. Twins of ``LogTail`` without files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path


class SilentTail:
    """What a worker prints that prints nothing."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.offset = start

    def size(self) -> int:
        """Nothing more than was read."""
        return self.offset

    def read(self, max_bytes: int) -> list[str]:
        """The next lines."""
        return []

    def finish(self, max_bytes: int) -> list[str]:
        """The last lines."""
        return []

    def last_lines(self) -> list[str]:
        """None."""
        return []

    def close(self) -> None:
        """There is nothing to let go of."""


class Flood:
    """A flood of log lines of all workers whose agents open tails with ``open_tail``: warnings, which all are shown.

    Attributes:
        lines_per_s: Of each worker; 0: they are silent.
        num_lines: How many were read from all of them.
    """

    def __init__(self) -> None:
        self.lines_per_s = 0.0
        self.num_lines = 0

    def open_tail(self, path: Path, start: int) -> SilentTail:
        """An ``OpenTail``."""
        return _FloodTail(path, start, self.pour)

    def pour(self, since: float, now: float) -> int:
        """How many lines a worker printed between two times."""
        count = int((now - since) * self.lines_per_s)
        self.num_lines += count
        return count


class _FloodTail(SilentTail):
    def __init__(self, path: Path, start: int, pour: Callable[[float, float], int]) -> None:
        super().__init__(path, start)
        self._pour = pour
        self._since = self._now()

    def read(self, max_bytes: int) -> list[str]:
        now = self._now()
        first, count = self.offset, min(self._pour(self._since, now), max_bytes // 100)
        self._since = now
        self.offset += 100 * count
        return [f"WARNING byte {first + 100 * index} of {self.path.name}: {'x' * 60}" for index in range(count)]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
