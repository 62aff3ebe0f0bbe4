"""Figures as tables, for the terminal and as Markdown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

from packing_bench.figures import Quality
from packing_bench.lengths import KINDS, Size
from packing_bench.sides import OURS
from runtime_bench.report import number, table

BEGIN = "<!-- begin: written by benchmarks/packing.py -->"
END = "<!-- end: written by benchmarks/packing.py -->"
GOAL_S = 1.0
HEADER = ("", "CPU time", "x ours", "micro-batches", "imbalance", "in FLOPs", "waiting", "padding", "fullest")


@dataclass
class Measured:
    """A side on a kind of rollout: seconds of each round, and what came out."""

    seconds: list[float]
    quality: Quality

    @property
    def typical_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Results:
    """All that was measured. ``found`` by kind of rollout, then by side."""

    size: Size
    circumstances: Mapping[str, str]
    rounds: int
    bounds: dict[str, Quality] = field(default_factory=dict)
    found: dict[str, dict[str, Measured]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def insert(document: str, text: str) -> str:
    """``document`` with ``text`` between its markers. Raises ValueError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def rows(results: Results, kind: str) -> list[list[str]]:
    """The cells of one kind of rollout, in the columns of ``HEADER``."""
    found = results.found[kind]
    base = next((found[side].typical_s for side in OURS if side in found), None)
    cells = [["nothing can be better than", "", "", *_quality(results.bounds[kind])]]
    for side, measured in found.items():
        ratio = "" if base is None else number(measured.typical_s / base)
        cells.append([side, _seconds(measured.typical_s), ratio, *_quality(measured.quality)])
    return cells


def slowest(results: Results) -> tuple[float, str]:
    """Of ours: the slowest median, and of what."""
    return max(
        (
            (found[side].typical_s, f"{kind}, {side}")
            for kind, found in results.found.items()
            for side in OURS
            if side in found
        ),
        default=(0.0, "nothing"),
    )


def verdict(results: Results) -> str:
    """One sentence: reached or not."""
    seconds, what = slowest(results)
    word = "reached" if seconds < GOAL_S else "short"
    return (
        f"The schedule of {results.size.samples:,} samples for {results.size.ranks} ranks takes "
        f"{_seconds(seconds)} of CPU time at most ({what}); asked for is less than {_seconds(GOAL_S)}: {word}."
    )


def markdown(results: Results) -> str:
    """All of it."""
    tables = [
        f"#### {kind.capitalize()}: {KINDS[kind]}\n\n{table(HEADER, rows(results, kind))}" for kind in results.found
    ]
    told = [f"* {name}: {what}." for name, what in results.circumstances.items()]
    told += [f"* Not measured: {side} ({why})." for side, why in results.missing.items()]
    told.append(f"* Medians of {_times(results.rounds)}; budget {results.size.budget:,} tokens, "
                f"static micro-batches of {results.size.micro_batch_size} samples.")  # fmt: skip
    return "\n\n".join([verdict(results), *tables, "#### Circumstances", "\n".join(told)]) + "\n"


def _times(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds} rounds"


def _quality(quality: Quality) -> Sequence[str]:
    count, *shares, fullest = astuple(quality)
    return [f"{count:.0f}", *(_percent(share) for share in shares), f"{fullest:.2f}"]


def _percent(share: float) -> str:
    return f"{number(share * 100) if share >= 5e-6 else '0'} %"


def _seconds(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1000)} ms"
