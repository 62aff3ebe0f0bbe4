"""Checks and measures Miles on NVIDIA GPUs: ``python benchmarks/gpu/run.py --out DIRECTORY [STAGE...]``.

Every stage runs in a process of its own with a deadline of its own. What it finds is written to
``DIRECTORY/results.jsonl`` as soon as it is known, and its log to ``DIRECTORY/STAGE.log``, so a stage that fails or
hangs loses nothing of the others. Stages that need one GPU and measure no speed run beside each other where there are
several. A table comes last. ``docs/gpu.md`` says what has to be installed, and which stages need how many GPUs.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    *(str(Path(__file__).parents[2] / part) for part in ("", "agents", "controller", "launcher")),
]

from gpu_bench.memory import num_gpus  # noqa: E402
from gpu_bench.placing import may_share  # noqa: E402
from gpu_bench.rehearsal import VARIABLE, is_rehearsal  # noqa: E402
from gpu_bench.results import Results, read_rows, table_of  # noqa: E402
from gpu_bench.runs import visible  # noqa: E402
from gpu_bench.stages import REHEARSAL_S, STAGES, chosen, lanes, left_out  # noqa: E402
from main_job_bench.processes import RunFailed, adopt_orphans, environment, python, run  # noqa: E402

_REHEARSED_GPUS = 2
_TABLE_S, _LEAST_S = 40.0, 30.0
"""Of ``--within``: kept for ending the last stage and for the table; what a stage needs to begin."""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.rehearse:
        os.environ[VARIABLE] = "1"
    gpus = arguments.gpus or (_REHEARSED_GPUS if is_rehearsal() else num_gpus())
    if arguments.only:
        STAGES[arguments.only].run(Results(out, arguments.only), gpus)
        return 0
    adopt_orphans()
    without = left_out(arguments.stages, gpus, rehearsal=is_rehearsal(), may_share=may_share())
    for name, why in without.items():
        print(f"{name} is left out: it {why}", flush=True)
        Results(out, name).add("stage", "left out", note=why)
    names = [name for name in chosen(arguments.stages, gpus, may_share=may_share()) if name not in without]
    side = [] if is_rehearsal() else lanes(names, gpus)
    ends = time.monotonic() + arguments.within
    failed = not beside(side, out, ends)
    for name in names:
        if not any(name in lane for lane in side):
            failed = not measure(name, out, gpus, ends) or failed
    if not arguments.lane:
        print(table_of(read_rows(out)))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all that fit")
    parser.add_argument("--out", type=Path, required=True, help="for logs, results and the models that are made")
    parser.add_argument("--gpus", type=int, help="use so many; default: all that there are")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="end stages in time for that")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model: do the stages run?")
    parser.add_argument("--only", metavar="STAGE", help=argparse.SUPPRESS)
    parser.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)
    return parser


def beside(side: Sequence[Sequence[str]], out: Path, ends: float) -> bool:
    """Run these stages, each lane on a GPU of its own; whether all ended well. Each stage has its deadline."""
    lanes_running = []
    for gpu, names in enumerate(side):
        command = python(
            __file__, "--lane", "--gpus", "1", "--within", str(ends - time.monotonic()), "--out", str(out), *names
        )
        env = environment(os.cpu_count() or 1)
        env["CUDA_VISIBLE_DEVICES"] = visible((gpu,), os.environ.get("CUDA_VISIBLE_DEVICES"))
        lanes_running.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL))
    codes = [lane.wait() for lane in lanes_running]
    return not any(codes)


def measure(name: str, out: Path, gpus: int, ends: float) -> bool:
    """Run a stage on so many GPUs, until ``ends`` at most; whether it ended well."""
    stage, results, began = STAGES[name], Results(out, name), time.monotonic()
    command = python(__file__, "--only", name, "--gpus", str(gpus), "--out", str(out))
    print(f"{name} ...", flush=True)
    deadline_s = max(REHEARSAL_S, stage.deadline_s) if is_rehearsal() else stage.deadline_s
    left_s = ends - began - _TABLE_S
    if left_s < _LEAST_S:
        results.add("stage", "left out", note=f"{left_s:.0f} s are left of --within")
        return False
    deadline_s = min(deadline_s, left_s)
    why = ""
    try:
        run(command, env=environment(os.cpu_count() or 1), log_path=out / f"{name}.log", deadline_s=deadline_s)
    except RunFailed as error:
        why = str(error)
        print(why, flush=True)
    results.add("stage", "failed" if why else "done", note=why.rpartition("\n")[2])
    results.add("seconds", round(time.monotonic() - began, 1), "s")
    return not why


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
