"""Whole runs with real engines that need two GPUs: weights by an NCCL broadcast, and by CUDA IPC to several ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gpu_bench import rehearsal
from gpu_bench.memory import MemoryWatch
from gpu_bench.results import Results
from gpu_bench.runs import Run, together
from gpu_bench.training import flags, memory_of, metrics_of
from main_job_bench.processes import RunFailed

CHECKED = re.compile(r"weight version (\d+) checked")
ROLLOUTS, TOKENS = 3, 128
_RUN_S = 190.0

TENSOR_PARALLEL = ("--tensor-model-parallel-size", "2", "--sequence-parallel")


def _short(*, rollouts: int = ROLLOUTS) -> tuple[str, ...]:
    tokens = min(TOKENS, rehearsal.sizes()[2])
    return ("--num-rollout", str(rollouts), "--rollout-max-response-len", str(tokens), "--check-weight-update-equal")


def disaggregated(results: Results, backend: str, trainer: str, engine: str) -> None:
    """Trainer and engine on GPUs of their own: weights go by NCCL, and are checked against an export each time."""
    name = results.stage
    arguments = flags(
        results.out, backend, results.out / f"run-{name}", "--actor-num-gpus-per-node", trainer,
        "--rollout-num-gpus", engine, "--rollout-num-gpus-per-engine", engine, *_short(rollouts=4),
        *(TENSOR_PARALLEL if trainer == "2" else ()),
    )  # fmt: skip
    checked_run(results, name, arguments, rollouts=4)


def colocated_two(results: Results, backend: str, layout: str) -> None:
    """Both GPUs shared by trainer and engines. ``layout`` tp: each is spread over both, so each engine's rank gets its
    weights by CUDA IPC from the rank beside it; dp: two replicas of either. An engine over two GPUs that fails is tried
    again with NCCL in the place of SGLang's own all-reduce."""
    try:
        _colocated_two(results, backend, layout)
    except (RunFailed, RuntimeError) as error:
        if layout != "tp":
            raise
        results.add("with SGLang's own all-reduce", "failed", note=str(error)[:600])
        _colocated_two(results, backend, layout, "--sglang-disable-custom-all-reduce")


def _colocated_two(results: Results, backend: str, layout: str, *more: str) -> None:
    size, name = "2" if layout == "tp" else "1", results.stage + ("-again" if more else "")
    arguments = flags(
        results.out, backend, results.out / f"run-{name}", "--colocate", "--actor-num-gpus-per-node", "2",
        "--rollout-num-gpus", "2", "--rollout-num-gpus-per-engine", size, *_short(),
        *(TENSOR_PARALLEL if layout == "tp" else ()), *more,
    )  # fmt: skip
    with MemoryWatch(0) as watch:
        checked_run(results, name, arguments, rollouts=ROLLOUTS)
    memory_of(results, results.out / f"run-{name}", watch)


def checked_run(results: Results, name: str, arguments: Sequence[str], *, rollouts: int) -> None:
    """A run with ``--check-weight-update-equal``, and what it found. Raises RunFailed if it did not end well, and
    RuntimeError if an update was not checked."""
    run_dir = Path(arguments[arguments.index("--run-dir") + 1])
    each = Run(name, arguments)
    try:
        together(results.out, [each], 500.0 if rehearsal.is_rehearsal() else _RUN_S)
    finally:
        if (run_dir / "metrics.jsonl").exists():
            metrics_of(results, run_dir)
    told_checked(results, each.log(results.out), rollouts=rollouts)


def told_checked(results: Results, log: Path, *, rollouts: int, name: str = "") -> None:
    """How many weight versions were checked: the first one and one after each rollout. Raises RuntimeError if fewer."""
    checked = CHECKED.findall(log.read_text(errors="replace"))
    results.add(
        f"{name}weight versions that engines and export agree on", len(checked),
        note=f"{', '.join(checked)}; expected {rollouts + 1}",
    )  # fmt: skip
    if len(set(checked)) <= rollouts:
        raise RuntimeError(f"only versions {', '.join(checked)} were checked")
