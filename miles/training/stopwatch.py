"""Where the time of an iteration goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from miles.utils.spans import SpanLog


class Stopwatch:
    """Seconds by part of one iteration; ``spans`` are for the trace."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans = SpanLog()
        self._began = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count what happens inside for ``part``."""
        began, at = time.perf_counter(), time.time()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[part] = self.seconds.get(part, 0.0) + took
            self.spans.add(part, at, at + took)

    def metrics(self) -> dict[str, float]:
        """``perf/{part}_time``, ``perf/step_time`` and what no part accounts for as ``perf/other_time``; how long
        the trainer waits for others is ``perf/train_wait_time``, and its share ``perf/wait_time_ratio``."""
        total = time.perf_counter() - self._began
        parts = {f"perf/{part}_time": seconds for part, seconds in self.seconds.items()}
        if "train" in self.seconds and total > 0:
            waits = total - self.seconds["train"]
            parts |= {"perf/train_wait_time": waits, "perf/wait_time_ratio": waits / total}
        return {**parts, "perf/step_time": total, "perf/other_time": total - sum(self.seconds.values())}
