"""The main job: where an iteration's time goes, samples per second beside TRL, and the bytes of a weight update.

    pip install -e '.[bench]'
    python benchmarks/main_job.py --markdown docs/performance.md

What cannot be run here is named and left out. The exit code says whether everything could be measured, not how it went.
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

from main_job_bench import circumstances, report, steps
from main_job_bench.figures import Results
from main_job_bench.sizes import QUICK, REFERENCE


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    size = QUICK if options.quick else REFERENCE
    threads = circumstances.use_cores(options.cores)
    results = Results(
        size=size.as_json(),
        machine=circumstances.machine(),
        versions=circumstances.versions(),
        threads=threads,
        rounds=options.rounds,
    )
    wanted = options.only or list(steps.QUESTIONS)
    results.why_missing = {name: why for name in wanted if (why := steps.why_not(name))}
    able = [name for name in wanted if name not in results.why_missing]
    with steps.Bench(size, threads, results, keep=options.keep) as bench:
        _measure(bench, bench.plan(able, options.rounds))
    failed = bool(results.failures or results.why_missing)  # now, not in an earlier run
    if options.add:
        results.add(Results.from_json(json.loads(options.add.read_text())))
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
    parser.add_argument("--rounds", type=_positive, default=2, metavar="N", help="runs of each side (default 2)")
    parser.add_argument("--only", type=_names(steps.QUESTIONS), metavar="NAMES", help=f"of {','.join(steps.QUESTIONS)}")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few iterations: to see that it works")
    parser.add_argument("--cores", type=_positive, default=2, metavar="N", help="cores for each side (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--add", type=Path, metavar="FILE", help="what is not measured now: from this earlier --json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables between the file's markers")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep models, logs and run directories there")
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


def _measure(bench: steps.Bench, plan: Sequence[steps.Step]) -> None:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(plan))
        for step in plan:
            bar.update(task, description=str(step))
            if not console.is_terminal:  # there the bar is shown once, at the end
                console.print(f"{bar.tasks[task].completed:g}/{len(plan)} {step}", highlight=False)
            if said := bench.take(step):
                console.print(f"{step} failed:\n{said}", markup=False)
            bar.advance(task)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # all that was started has ended; what was measured so far says too little to be shown
