"""Checks and measures Miles on NVIDIA GPUs: ``python benchmarks/gpu/run.py --out DIRECTORY [STAGE...]``.

Every stage runs in a process of its own with a deadline of its own. What it finds is written to
``DIRECTORY/results.jsonl`` as soon as it is known, and its log to ``DIRECTORY/STAGE.log``, so a stage that fails or
hangs loses nothing of the others. A table comes last. ``docs/gpu.md`` says what has to be installed, and which
stages need how many GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    *(str(Path(__file__).parents[2] / part) for part in ("", "agents", "controller", "launcher")),
]

from gpu_bench.results import Results, read_rows, table_of  # noqa: E402
from gpu_bench.stages import STAGES, chosen  # noqa: E402
from main_job_bench.processes import RunFailed, adopt_orphans, environment, python, run  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all that fit")
    parser.add_argument("--out", type=Path, required=True, help="for logs, results and the models that are made")
    parser.add_argument("--gpus", type=int, default=1, help="how many there are; stages that need more are left out")
    parser.add_argument("--only", metavar="STAGE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        STAGES[arguments.only].run(Results(out, arguments.only))
        return 0
    adopt_orphans()
    failed = [name for name in chosen(arguments.stages, arguments.gpus) if not measure(name, out, arguments.gpus)]
    print(table_of(read_rows(out)))
    return 1 if failed else 0


def measure(name: str, out: Path, gpus: int) -> bool:
    """Run a stage; whether it ended well."""
    stage, results, began = STAGES[name], Results(out, name), time.monotonic()
    command = python(__file__, "--only", name, "--out", str(out), "--gpus", str(gpus))
    print(f"{name} ...", flush=True)
    why = ""
    try:
        run(command, env=environment(os.cpu_count() or 1), log_path=out / f"{name}.log", deadline_s=stage.deadline_s)
    except RunFailed as error:
        why = str(error)
        print(why, flush=True)
    results.add("stage", "failed" if why else "done", note=why.rpartition("\n")[2])
    results.add("seconds", round(time.monotonic() - began, 1), "s")
    return not why


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
