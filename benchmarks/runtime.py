"""This runtime beside Ray, Monarch and bare ZeroMQ, measured in one run, in turn.

    pip install -e '.[bench]'
    python benchmarks/runtime.py --markdown docs/performance.md

Every figure comes from a process of its own, per round and system. What is not installed is named and left out.
The exit code says whether everything could be measured, not how it went.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from runtime_bench import circumstances, parent, report
from runtime_bench.figures import Results
from runtime_bench.rows import BY_NAME, CASES, SYSTEMS


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    results = Results(machine=circumstances.machine(), versions=circumstances.versions(), num_rounds=options.rounds)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    systems = [system for system in SYSTEMS if not options.systems or system in options.systems]
    for system in systems:
        if why := circumstances.why_missing(system):
            results.why_missing[system] = why
    runs = parent.plan(cases, [system for system in systems if system not in results.why_missing], options.rounds)
    _measure(runs, results, effort="quick" if options.quick else "full")
    failed = bool(results.failures)  # now, not in an earlier run
    if options.add:
        others = [case for case in CASES if case not in cases]
        results.add(Results.from_json(json.loads(options.add.read_text())), others)
    if options.json:
        options.json.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    text = report.markdown(results)
    if options.markdown:
        options.markdown.write_text(report.insert(options.markdown.read_text(), text))
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="rounds of each case (default 5)")
    parser.add_argument("--only", type=_names(BY_NAME), metavar="CASES", help=f"of {','.join(BY_NAME)}")
    parser.add_argument("--systems", type=_names(SYSTEMS), metavar="NAMES", help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--quick", action="store_true", help="fewer calls in each round: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--add", type=Path, metavar="FILE", help="cases not measured now: from this earlier --json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables between the file's markers")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return parse


def _measure(runs: Sequence[parent.Run], results: Results, *, effort: str) -> None:
    parent.adopt_orphans()
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(runs))
        for run in runs:
            bar.update(task, description=str(run))
            if not console.is_terminal:  # there the bar is shown once, at the end
                console.print(f"{bar.tasks[task].completed:g}/{len(runs)} {run}", highlight=False)
            if said := parent.measure(run, results, effort=effort):
                console.print(f"{run} failed:\n{said}", markup=False)
            bar.advance(task)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # all that was started has ended; what was measured so far says too little to be shown
