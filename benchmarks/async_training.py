"""Asynchronous training beside synchronous: wall-clock per 1,000 trained samples where answers have a long tail and
training takes about as long as generating.

    python benchmarks/async_training.py --markdown docs/performance.md

Runs ``train.py``, ``train_async.py`` one step ahead and ``--fully-async`` in turn, ``--rounds`` times, and takes
medians. The runtime, the rollout side and the trainer are the real ones; the engine is the fake one of the tests with
scripted latencies, and a training step sleeps for most of its time. So what is measured is what the loops do with
waiting, and not how fast this machine multiplies. The exit code says whether everything could be measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.tiny_models import tiny_model
from support.training_runs import write_prompts

from async_bench.runs import GROUPS, SAMPLES, WAYS, Figures, RunFailed, Sizes, run

BEGIN, END = (
    "<!-- begin: written by benchmarks/async_training.py -->",
    "<!-- end: written by benchmarks/async_training.py -->",
)
GOAL, BOUND = 1.3, 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args(argv)
    sizes = Sizes(rollouts=options.rollouts)
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, list[Figures]] = {way: [] for way in WAYS}
    failed = False
    with tempfile.TemporaryDirectory(prefix="async-training-") as scratch:
        model = tiny_model("qwen3", hidden=64, layers=2)
        write_prompts(Path(scratch) / "prompts.jsonl", count=256)
        for number in range(options.rounds):
            for way in WAYS:
                print(f"round {number + 1} of {options.rounds}: {way}", file=sys.stderr, flush=True)
                try:
                    found[way].append(run(way, model, Path(scratch), sizes, cores))
                except RunFailed as error:
                    print(error, file=sys.stderr)
                    failed = True
    failed = failed or not all(found.values())
    if not failed:
        text = report(found, sizes)
        print(text)
        if options.markdown:
            options.markdown.write_text(insert(options.markdown.read_text(), text))
    return 1 if failed else 0


def report(found: Mapping[str, Sequence[Figures]], sizes: Sizes) -> str:
    """Markdown: medians over rounds, and each way's ratio to the first."""
    lines = [
        "| | s per 1,000 samples (each) | trainer idle | engine idle | training, s a rollout | `train.py` / this |",
        "|---|---|---|---|---|---|",
    ]
    base = median(one.seconds for one in next(iter(found.values())))
    for way, rounds in found.items():
        seconds = median(one.seconds for one in rounds)
        each = ", ".join(f"{one.seconds:.1f}" for one in rounds)
        trainer, engines = (
            f"{100 * median(getattr(one, name) for one in rounds):.0f} %" for name in ("trainer_idle", "engines_idle")
        )
        train_s = median(one.train_s for one in rounds)
        lines.append(
            f"| `{way}` | {seconds:.1f} ({each}) | {trainer} | {engines} | {train_s:.2f} | {base / seconds:.2f} |"
        )
    lines += [
        "",
        f"A rollout is {GROUPS} prompts of {SAMPLES} answers: one takes {sizes.long} s, the others {sizes.short} s. "
        f"{sizes.rollouts - 1} rollouts a run are measured. The goal is {GOAL} times, the bound {BOUND} times.",
    ]
    return "\n".join(lines)


def insert(page: str, text: str) -> str:
    """The page with the text between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, in turn (3)")
    parser.add_argument(
        "--rollouts", type=int, default=9, help="rollouts of a run, of which the first is not measured (9)"
    )
    parser.add_argument("--markdown", type=Path, help="page whose part between the marks is written anew")
    return parser


if __name__ == "__main__":
    sys.exit(main())
