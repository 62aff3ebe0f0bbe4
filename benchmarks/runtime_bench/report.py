"""Results as Markdown: a summary against what is asked, a table per case, the machine and the versions. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from runtime_bench import figures
from runtime_bench.figures import Results, Spread
from runtime_bench.rows import CASES, COLUMN_TITLES, DISTRIBUTIONS, MONARCH, OURS, RAY, Case, Row

BEGIN = "<!-- begin: written by benchmarks/runtime.py -->"
END = "<!-- end: written by benchmarks/runtime.py -->"
_NOTHING = "-"


class MarkersMissing(Exception):
    """A document has no place for the tables."""


def markdown(results: Results) -> str:
    """All of it."""
    cases = [case for case in CASES if _measured(case, results)]
    parts = [_summary(cases, results), *(_case(case, results) for case in cases), _circumstances(results)]
    return "\n\n".join(parts) + "\n"


def insert(document: str, text: str) -> str:
    """``document`` with ``text`` between its markers. Raises MarkersMissing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MarkersMissing(f"no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float) -> str:
    """Three digits that count, no more; whole numbers from 100 up."""
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _measured(case: Case, results: Results) -> bool:
    return any(results.spread(column, row) for column in case.columns for row in case.rows)


def _summary(cases: Iterable[Case], results: Results) -> str:
    rows = []
    for case in cases:
        for row in case.rows:
            if not row.asked.must:
                continue
            spreads = {column: results.spread(column, row) for column in case.columns}
            rows.append(
                [
                    f"{case.title}: {row.title}",
                    _figure(spreads.get(OURS), row),
                    *(_times(spreads, row, column) for column in (RAY, MONARCH)),
                    figures.bound_text(row.asked.must, row),
                    figures.bound_text(row.asked.goal, row),
                    figures.verdict(row, spreads),
                ]
            )
    if not rows:
        return "### Summary\n\nNothing of what was measured is asked for."
    return "### Summary\n\n" + table(["measured", "ours", "vs Ray", "vs Monarch", "must", "goal", "verdict"], rows)


def _times(spreads: dict[str, Spread | None], row: Row, column: str) -> str:
    """Our advantage over a column, as ``4.1x``; a capped peer was at least so much worse."""
    ours, other = spreads.get(OURS), spreads.get(column)
    if ours is None or other is None:
        return _NOTHING
    if math.isinf(other.median):
        return f"> {number((row.cap or math.inf) / ours.median)}x"
    return f"{number(figures.ratio(ours, other, higher_is_better=row.higher_is_better))}x"


def _case(case: Case, results: Results) -> str:
    rows = []
    for row in case.rows:
        spreads = {column: results.spread(column, row) for column in case.columns}
        rows.append([row.title, *(_cell(column, row, spreads, results) for column in case.columns)])
    header = ["", *(COLUMN_TITLES[column] for column in case.columns)]
    return f"### {case.title}\n\n" + table(header, rows)


def _cell(column: str, row: Row, spreads: dict[str, Spread | None], results: Results) -> str:
    found = spreads[column]
    if found is None:
        return results.why_missing.get(column, _NOTHING)
    text = f"{_figure(found, row)}{_range(found)}"
    if column == OURS or spreads.get(OURS) is None:
        return text
    return f"{text}, {_times(spreads, row, column)}"


def _figure(found: Spread | None, row: Row) -> str:
    if found is None:
        return _NOTHING
    if math.isinf(found.median):
        return f"not within {row.cap:g} s"
    return f"{number(found.median)} {row.unit}".rstrip()


def _range(found: Spread) -> str:
    if found.num_rounds < 2 or math.isinf(found.median):
        return ""
    high = "cap" if math.isinf(found.high) else number(found.high)
    return f" ({number(found.low)}..{high})"


def _circumstances(results: Results) -> str:
    lines = [f"* Machine: {', '.join(f'{name} {value}' for name, value in results.machine.items())}."]
    versions = [f"{name} {value}" for name, value in results.versions.items()]
    lines.append(f"* Versions: {', '.join(versions)}.")
    lines.append(f"* {results.num_rounds} rounds, systems in turn; medians (lowest..highest round).")
    lines += [f"* {DISTRIBUTIONS[system]}: {why}." for system, why in results.why_missing.items()]
    lines += [f"* {note}" for note in results.notes]
    lines += [f"* Failed: {failure}" for failure in results.failures]
    return "### Circumstances\n\n" + "\n".join(lines)
