"""The schedule of a large rollout: how long it takes, and how even and how full it is, beside other ways to make it.

    pip install -e '.[bench]'
    python benchmarks/packing.py --markdown docs/performance.md

Times are CPU times: each side uses one thread, and waits for nothing, so on an idle machine that is what a clock shows.
Who is not installed is named and left out. The exit code says whether all schedules were right, and ours in time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from packing_bench import report
from packing_bench.figures import bound, quality
from packing_bench.lengths import FULL, KINDS, QUICK, Lengths, Size, lengths
from packing_bench.report import Measured, Results
from packing_bench.sides import OURS, PEERS, SLOW_PEERS, Schedule, why_missing
from runtime_bench.circumstances import machine


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args(argv)
    results = measure(QUICK if options.quick else FULL, options.rounds, slow=not options.no_slow)
    text = report.markdown(results)
    if options.markdown:
        options.markdown.write_text(report.insert(options.markdown.read_text(), text))
    _show(results)
    return 0 if report.slowest(results)[0] < report.GOAL_S else 1


def measure(size: Size, rounds: int, *, slow: bool) -> Results:
    """All sides on all kinds of rollouts, in turn."""
    results = Results(size, {"Machine": ", ".join(f"{k} {v}" for k, v in machine().items())}, rounds)
    first = next(iter(KINDS))
    sides = {**OURS, **PEERS, **SLOW_PEERS}
    results.missing = {side: why for side in sides if (why := why_missing(side))}
    plan = [
        (kind, side)
        for kind in KINDS
        for side in sides
        if side not in results.missing and (side not in SLOW_PEERS or (slow and kind == first))
    ]
    for kind, side in track(plan, "Measuring", console=Console(stderr=True), transient=True):
        given = lengths(kind, size)
        results.bounds.setdefault(kind, bound(given, size))
        times = 1 if side in SLOW_PEERS else rounds
        results.found.setdefault(kind, {})[side] = _run(sides[side], given, size, times)
    return results


def _run(make: Callable[[Lengths, Size], Schedule], given: Lengths, size: Size, rounds: int) -> Measured:
    seconds = []
    schedule: Schedule = []
    for _ in range(rounds):
        began = time.process_time()
        schedule = make(given, size)
        seconds.append(time.process_time() - began)
    return Measured(seconds, quality(schedule, given, size))


def _show(results: Results) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    for kind in results.found:
        table = Table(title=f"{kind}: {KINDS[kind]}", title_justify="left")
        for name in report.HEADER:
            table.add_column(name, justify="right" if name else "left")
        for cells in report.rows(results, kind):
            table.add_row(*cells)
        console.print(table)
    for side, why in results.missing.items():
        console.print(f"not measured: {side} ({why})")
    console.print(report.verdict(results), highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="schedules of each side (default 3)")
    parser.add_argument("--quick", action="store_true", help="few samples and ranks: to see that it works")
    parser.add_argument("--no-slow", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables between the file's markers")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
