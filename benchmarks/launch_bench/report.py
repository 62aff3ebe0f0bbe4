"""Figures as Markdown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch_bench.reaction_figures import Reaction
from miles_agents.timings import Timings
from miles_launcher.bounded_start import Report
from runtime_bench.report import number, table

BEGIN = "<!-- begin: written by benchmarks/launch.py -->"
END = "<!-- end: written by benchmarks/launch.py -->"
GOAL = 3.0
CASES = {
    "runtime": "controller, agents (or `ray start`), 6 actors that have torch",
    "train": "`train.py --hosts` until 6 ranks of the trainer are constructed; Ray: actors that have imported the same",
}


@dataclass
class Results:
    """All that was measured. ``starts``: seconds of each round, by case and side."""

    circumstances: Mapping[str, str]
    rounds: int
    starts: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    reactions: list[Reaction] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    simulated: Report | None = None
    most_at_once: int = 0
    why_no_ray: str = ""
    failures: list[str] = field(default_factory=list)


def insert(document: str, text: str) -> str:
    """``document`` with ``text`` between its markers. Raises ValueError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def markdown(results: Results) -> str:
    """Tables and circumstances, of what was measured."""
    parts = []
    if results.starts:
        parts += ["#### From the command to all ready, on three hosts", _starts(results)]
    if results.reactions:
        parts += ["#### From a cut link to verdict and decision", _reactions(results)]
    if results.simulated is not None:
        parts += ["#### A thousand hosts, simulated", _simulated(results.simulated, results.most_at_once)]
    lines = [f"* {name}: {value}." for name, value in results.circumstances.items()]
    lines += [f"* {results.rounds} rounds."] + [f"* Left out: {results.why_no_ray}."] * bool(results.why_no_ray)
    lines += [f"* Failed: {failure.splitlines()[0]}" for failure in results.failures]
    return "\n\n".join([*parts, "#### Circumstances of starts", "\n".join(lines)]) + "\n"


def _starts(results: Results) -> str:
    rows = []
    for case, title in CASES.items():
        ours, theirs = (results.starts.get((case, side), []) for side in ("ours", "Ray"))
        ratio = statistics.median(theirs) / statistics.median(ours) if ours and theirs else None
        rows.append([title, _seconds(ours), _seconds(theirs), "" if ratio is None else number(ratio)])
    return table(["", "ours", "Ray", "Ray / ours"], rows)


def _seconds(values: list[float]) -> str:
    if not values:
        return "-"
    each = ", ".join(number(value) for value in values)
    return f"{number(statistics.median(values))} s ({each})"


def _reactions(results: Results) -> str:
    bound = results.timings.dead_s + 1.0
    rows = [
        [title, *(number(value) for value in (statistics.median(values), max(values))), f"{bound:g}"]
        for title, values in (
            ("the node is dead", [one.dead_s for one in results.reactions]),
            ("a call to a rank on it has its error", [one.error_s for one in results.reactions]),
            ("the mesh has failed: the job's decision", [one.decision_s for one in results.reactions]),
        )
    ]
    return table(["seconds after the cut until", "median", "longest", "at most"], rows)


def _simulated(report: Report, most_at_once: int) -> str:
    codes: dict[str, list[str]] = {}
    for node, error in report.failed.items():
        codes.setdefault(f"{error.what.replace(node, 'HOST')}: {error.evidence}", []).append(node)
    rows = [
        ["joined", f"{len(report.joined)}"],
        ["failed", f"{len(report.failed)}"],
        *([f"- {why}", f"{len(nodes)} ({', '.join(nodes[:3])}, ...)"] for why, nodes in codes.items()),
        ["most at once", f"{most_at_once}"],
        ["slowest that joined", f"{number(max(report.joined.values()))} s"],
        ["until all are told of", f"{number(report.seconds)} s of virtual time"],
    ]
    return table(["", ""], rows)
