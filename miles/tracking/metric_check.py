"""``--ci-metric-checker-key`` and ``--ci-metric-checker-threshold``: a run whose evaluations never reach it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping

from miles_agents.errors import ConfigError


class MetricBelowThreshold(ConfigError):
    """A run has ended as it should, but a metric of its evaluations has not reached what the flags ask for."""

    code = "E-TRACK-002"


class MetricCheck:
    """Looks at evaluations. Without key and threshold, everything is good."""

    def __init__(self, key: str | None, threshold: float | None) -> None:
        self._key = key
        self._threshold = threshold
        self._seen: list[float] = []
        self._names: set[str] = set()

    def see(self, metrics: Mapping[str, float]) -> None:
        """One evaluation."""
        self._names |= metrics.keys()
        if self._key is not None and self._key in metrics:
            self._seen.append(float(metrics[self._key]))

    def verdict(self) -> None:
        """At the end of the run.

        Raises:
            MetricBelowThreshold: No evaluation has reached the threshold.
        """
        if self._key is None or self._threshold is None or any(value >= self._threshold for value in self._seen):
            return
        seen = [value for value in self._seen if not math.isnan(value)]
        near = sorted(name for name in self._names if name.startswith("eval/"))
        raise MetricBelowThreshold(
            f"{self._key} has not reached {self._threshold:g}",
            evidence=f"the best of {len(self._seen)} evaluations was {max(seen):g}"
            if seen
            else f"no evaluation has such a number; there were {', '.join(near) or 'none'}",
            advice="Look at metrics.jsonl; lower --ci-metric-checker-threshold, or correct --ci-metric-checker-key.",
        )
