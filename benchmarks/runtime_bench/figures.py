"""What samples say: medians with their spread, ratios, verdicts. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime_bench.rows import COLUMN_TITLES, OURS, Bound, Case, Row

GOAL = "goal"
MUST = "must"
SHORT = "short"


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of one round. ``value`` is infinite where a cap was reached."""

    column: str
    metric: str
    value: float

    def as_json(self) -> dict[str, Any]:
        """In plain values; infinity is None."""
        return {
            "column": self.column,
            "metric": self.metric,
            "value": None if math.isinf(self.value) else self.value,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """The reverse. Raises KeyError if something is missing."""
        value = data["value"]
        return cls(str(data["column"]), str(data["metric"]), math.inf if value is None else float(value))


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over rounds, and how far they lie apart."""

    median: float
    low: float
    high: float
    num_rounds: int


@dataclass(slots=True)
class Results:
    """All that was measured. ``why_missing`` tells, by system, why it has no figures; ``failures`` what went wrong."""

    samples: list[Sample] = field(default_factory=list)
    why_missing: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    num_rounds: int = 0

    def add(self, earlier: Results, cases: Iterable[Case]) -> None:
        """Take the figures of these cases, and what was said of them, from an earlier run; a note says so."""
        cases = list(cases)
        metrics = {row.metric_of(column) for case in cases for row in case.rows for column in case.columns}
        self.samples += [sample for sample in earlier.samples if sample.metric in metrics]
        self.notes += [note for note in earlier.notes if note not in self.notes]
        names = tuple(f"{case.name}, " for case in cases)  # a failure begins with its case
        self.failures += [failure for failure in earlier.failures if failure.startswith(names)]
        self.notes.append(f"From another run: {', '.join(case.name for case in cases)}.")
        self.why_missing = {**earlier.why_missing, **self.why_missing}

    def spread(self, column: str, row: Row) -> Spread | None:
        """Of a row in a column; None if nothing was measured."""
        metric = row.metric_of(column)
        return spread(s.value for s in self.samples if s.column == column and s.metric == metric)

    def as_json(self) -> dict[str, Any]:
        """In plain values."""
        return {
            "machine": self.machine,
            "versions": self.versions,
            "num_rounds": self.num_rounds,
            "why_missing": self.why_missing,
            "failures": self.failures,
            "notes": self.notes,
            "samples": [sample.as_json() for sample in self.samples],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """The reverse. Raises KeyError if something is missing."""
        return cls(
            samples=[Sample.from_json(sample) for sample in data["samples"]],
            why_missing=dict(data["why_missing"]),
            failures=list(data["failures"]),
            notes=list(data["notes"]),
            machine=dict(data["machine"]),
            versions=dict(data["versions"]),
            num_rounds=int(data["num_rounds"]),
        )


def spread(values: Iterable[float]) -> Spread | None:
    """Median and range; None of nothing."""
    found = list(values)
    if not found:
        return None
    return Spread(statistics.median(found), min(found), max(found), len(found))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile. ``values`` must not be empty."""
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def ratio(ours: Spread, other: Spread, *, higher_is_better: bool) -> float:
    """How many times as good as the other we are, by medians. Infinite if the other never got there."""
    good, bad = (ours, other) if higher_is_better else (other, ours)
    if bad.median == 0 or math.isinf(good.median):
        return math.inf
    return good.median / bad.median


def holds(bound: Bound, row: Row, ours: Spread, spreads: Mapping[str, Spread | None]) -> bool | None:
    """Whether a bound is kept; None if the figure it needs is missing."""
    if bound.column is None:
        return ours.median >= bound.factor if row.higher_is_better else ours.median <= bound.factor
    other = spreads.get(bound.column)
    if other is None:
        return None
    return ratio(ours, other, higher_is_better=row.higher_is_better) >= bound.factor


def verdict(row: Row, spreads: Mapping[str, Spread | None]) -> str:
    """``goal``, ``must`` or ``short``; what is missing if that cannot be told; nothing if nothing is asked."""
    if not row.asked.must:
        return ""
    ours = spreads.get(OURS)
    if ours is None:
        return "not measured"
    must = [holds(bound, row, ours, spreads) for bound in row.asked.must]
    goal = [holds(bound, row, ours, spreads) for bound in row.asked.goal]
    if False in must:
        return SHORT
    if None in must:
        return "not judged: " + _missing(row.asked.must, spreads)
    if False in goal:
        return MUST
    if None in goal:
        return f"{MUST}; goal not judged: " + _missing(row.asked.goal, spreads)
    return GOAL


def _missing(bounds: Iterable[Bound], spreads: Mapping[str, Spread | None]) -> str:
    names = [COLUMN_TITLES[b.column] for b in bounds if b.column is not None and spreads.get(b.column) is None]
    return f"no figure for {' and '.join(names)}"


def bound_text(bounds: Iterable[Bound], row: Row) -> str:
    """For people: ``4x Ray, 2.5x Monarch``, or ``50 ms``."""
    return ", ".join(_bound_text(bound, row) for bound in bounds)


def _bound_text(bound: Bound, row: Row) -> str:
    if bound.column is None:
        return f"{bound.factor:g} {row.unit}"
    name = COLUMN_TITLES[bound.column]
    return f"as {name}" if bound.factor == 1 else f"{bound.factor:g}x {name}"
