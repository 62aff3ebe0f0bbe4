"""Seconds by phase, and which phase a rank is in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from miles.utils.spans import SpanLog


class Timers:
    """Seconds since ``take``. ``phase`` may be read from another thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase = "idle"
        self.seconds: dict[str, float] = {}
        self.spans = SpanLog()
        """For the trace of the run."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count what happens inside for ``name``; on a GPU, until it is done. In a trace it is a span of that name."""
        outer, self.phase = self.phase, name
        began, at = time.perf_counter(), time.time()
        try:
            with torch.profiler.record_function(name):
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            self.spans.add(name, at, at + took)
            self.phase = outer

    def take(self) -> dict[str, float]:
        """``perf/{name}_time`` of all, which begin anew."""
        taken = {f"perf/{name}_time": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken
