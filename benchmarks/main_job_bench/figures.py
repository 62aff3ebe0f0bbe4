"""What was measured, and what follows from it: shares, ratios, verdicts. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GENERATION, LOG_PROBS, TRAINING, UPDATE, REST = "generation", "log_probs", "training", "update", "rest"
PARTS = (GENERATION, LOG_PROBS, TRAINING, UPDATE, REST)
"""Of an iteration. What no other part accounts for is ``rest``."""

OURS, OURS_WIDE, TRL, TRL_WIDE = "ours", "ours_wide", "trl", "trl_wide"
"""Columns: ours with one rank and one engine, and with one of each per core; TRL with one thread, and one per core."""
PEERS = (TRL, TRL_WIDE)

MAX_REST_SHARE = 0.10
MAX_TIMES_MEMCPY = 4.0
REACHED, SHORT = "reached", "short"


@dataclass(frozen=True)
class Iteration:
    """One iteration of a run, evaluation and checkpoints apart.

    Attributes:
        wall: Seconds from the end of the last iteration to the end of this one.
        parts: Seconds by part; sums to ``wall``.
        detail: Seconds within parts, by the names of whoever measured them.
        apart: Seconds of evaluation and of checkpoints meanwhile, not in ``wall``.
        samples, tokens: That it trained on; tokens of answers only.
    """

    wall: float
    parts: dict[str, float]
    samples: int
    tokens: float
    detail: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run, from its start: ``start_up`` seconds to the first iteration's beginning, then measured iterations."""

    column: str
    start_up: float
    iterations: list[Iteration]

    @property
    def seconds(self) -> float:
        """Of all iterations."""
        return sum(one.wall for one in self.iterations)

    @property
    def samples_per_second(self) -> float:
        """End to end."""
        return sum(one.samples for one in self.iterations) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers, end to end."""
        return sum(one.tokens for one in self.iterations) / self.seconds

    @property
    def tokens_per_sample(self) -> float:
        """Mean length of an answer: must be alike on both sides."""
        return sum(one.tokens for one in self.iterations) / sum(one.samples for one in self.iterations)

    def mean(self, part: str) -> float:
        """Seconds of a part per iteration."""
        return statistics.fmean(one.parts.get(part, 0.0) for one in self.iterations)

    def share(self, part: str) -> float:
        """Of the wall-clock time of all iterations."""
        return sum(one.parts.get(part, 0.0) for one in self.iterations) / self.seconds


@dataclass(frozen=True)
class Update:
    """One weight update and the memcpy beside it.

    Attributes:
        total: Seconds, from asking until the engine reports the new version.
        gathering: Of it: the trainer's making tensors with Hugging Face's names and shapes.
        copying: Of it: filling the shared memory.
        loading: Of it: the engine's copying into its parameters.
        memcpy: Seconds of copying the same bytes within one process.
        num_bytes: Moved.
        detail: Seconds by the names of whoever measured them.
    """

    total: float
    gathering: float
    copying: float
    loading: float
    memcpy: float
    num_bytes: int
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def moving(self) -> float:
        """Seconds in which bytes were moved, as if one way came after the other: they may overlap."""
        return self.gathering + self.copying + self.loading

    @property
    def calls(self) -> float:
        """Seconds of everything around: what is left of the whole."""
        return self.total - self.moving

    @property
    def times_memcpy(self) -> float:
        """Moving the bytes against a memcpy of them."""
        return self.moving / self.memcpy


@dataclass
class Results:
    """Of one run of the benchmark."""

    size: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    rounds: int = 0
    runs: list[Run] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    why_missing: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, column: str) -> list[Run]:
        """The column's runs."""
        return [run for run in self.runs if run.column == column]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Results:
        """The reverse."""
        runs = [
            Run(**{**run, "iterations": [Iteration(**one) for one in run["iterations"]]}) for run in content["runs"]
        ]
        return cls(**{**content, "runs": runs, "updates": [Update(**one) for one in content["updates"]]})

    def add(self, earlier: Results) -> None:
        """Take from an earlier run what was not measured now; the sizes must be the same. Raises ValueError."""
        if self.size != earlier.size:
            raise ValueError("the earlier run had other sizes")
        columns = {run.column for run in self.runs}
        taken = [run for run in earlier.runs if run.column not in columns]
        self.runs += taken
        names = list(dict.fromkeys(run.column for run in taken))
        if not self.updates and earlier.updates:
            self.updates = earlier.updates
            names.append("update")
        for name, why in earlier.why_missing.items():
            self.why_missing.setdefault(name, why)
        if names:
            self.notes.append(f"From another run: {', '.join(names)}.")


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some values."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """None of nothing."""
    found = sorted(values)
    if not found:
        return None
    return Spread(statistics.median(found), found[0], found[-1], len(found))


def over(runs: Sequence[Run], figure: Callable[[Run], float]) -> Spread | None:
    """A figure over rounds."""
    return spread(figure(run) for run in runs)


def samples_ratio(results: Results, column: str) -> float | None:
    """Our samples per second against TRL's at its best, by medians; above 1 we are faster."""
    ours = over(results.of(column), _rate)
    peers = [found.median for name in PEERS if (found := over(results.of(name), _rate)) is not None]
    return None if ours is None or not peers else ours.median / max(peers)


def _rate(run: Run) -> float:
    return run.samples_per_second


def at_most(value: float | None, bound: float) -> str:
    """The verdict."""
    if value is None:
        return "not measured"
    return REACHED if value <= bound else SHORT
