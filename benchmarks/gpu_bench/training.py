"""Whole runs of ``train.py`` on a random model of Qwen3-0.6B's shape with real engines."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_bench import rehearsal
from gpu_bench.memory import ENGINE, TRAINER, MemoryWatch, by_iteration, creep, read_spans, released
from gpu_bench.model import model, prompts
from gpu_bench.results import Results
from gpu_bench.runs import threads
from main_job_bench.processes import ROOT, environment, python, run
from miles.tracking.metrics_file import read_metrics

ROLLOUTS = {"megatron": 11, "fsdp": 5}
CHECKSUM = re.compile(r"engine-0 holds weight version (\d+), checksum (\w+)")
_UPDATE = "perf/update_weights/"


def flags(out: Path, backend: str, run_dir: Path, *more: str, shape: str = "0.6B") -> list[str]:
    """Of a GRPO run; ``more`` come last and win."""
    num_prompts, answers, tokens = rehearsal.sizes()
    return [
        "--hf-checkpoint", str(model(out, shape)), "--prompt-data", str(prompts(out)), "--run-dir", str(run_dir),
        "--train-backend", backend, "--input-key", "prompt", "--label-key", "label",
        "--custom-rm-path", "gpu_bench.hooks.low_tokens", "--advantage-estimator", "grpo", "--lr", "1e-5",
        "--rollout-batch-size", str(num_prompts), "--n-samples-per-prompt", str(answers),
        "--rollout-max-response-len", str(tokens), "--use-dynamic-batch-size",
        "--max-tokens-per-gpu", str(rehearsal.max_tokens()), "--actor-num-gpus-per-node", "1",
        *rehearsal.run_flags(backend), *more,
    ]  # fmt: skip


def train(results: Results, name: str, arguments: Sequence[str], deadline_s: float) -> None:
    """Run to the end. Raises RunFailed."""
    run(
        python(str(ROOT / "train.py"), *arguments), env=environment(threads(), {"NO_COLOR": "1", "COLUMNS": "160"}),
        log_path=results.out / f"{name}.run.log", deadline_s=deadline_s,
    )  # fmt: skip


def colocated(results: Results, backend: str) -> None:
    """GRPO on one GPU: engine and trainer take turns with its memory; weights go by CUDA IPC and are checked."""
    out, run_dir = results.out, results.out / f"run-{backend}"
    export = out / f"export-{backend}"
    rollouts = 2 if rehearsal.is_rehearsal() else ROLLOUTS[backend]
    arguments = flags(
        out, backend, run_dir, "--colocate", "--rollout-num-gpus", "1", "--num-rollout", str(rollouts),
        "--check-weight-update-equal", "--save", str(out / f"save-{backend}"), "--save-interval", "1000",
        "--save-hf", str(export), "--no-save-optim",
    )  # fmt: skip
    with MemoryWatch() as watch:
        try:
            train(results, f"grpo-{backend}", arguments, 470.0)
        finally:
            metrics_of(results, run_dir)
            memory_of(results, run_dir, watch)
    said = (out / f"grpo-{backend}.run.log").read_text()
    checked = re.findall(r"weight version (\d+) checked", said)
    results.add("weight versions that engine and export agree on", len(checked), note=", ".join(checked))


def metrics_of(results: Results, run_dir: Path) -> None:
    """Rewards and seconds of the iterations that there were."""
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["event"] == "rollout"]
    results.add("iterations", len(rows))
    if not rows:
        return
    results.add(
        "mean reward, first and last", f"{rows[0]['rollout/raw_reward']:.3f}, {rows[-1]['rollout/raw_reward']:.3f}"
    )
    results.add(
        "log-prob difference to the engine, largest mean",
        max(row.get("train/train_rollout_logprob_abs_diff", 0.0) for row in rows),
    )
    parts = ("step", "rollout", "offload", "train", "update_weights")
    for name in [*(f"perf/{part}_time" for part in parts), *sorted(key for key in rows[-1] if key.startswith(_UPDATE))]:
        values = [row[name] for row in rows[1:] if name in row]
        if values:
            results.add(name, statistics.median(values), "s", f"median of {len(values)} iterations after the first")


def memory_of(results: Results, run_dir: Path, watch: MemoryWatch) -> None:
    """Who held what in which phase; whether hand-overs are complete, and whether anything grows."""
    trace = run_dir / "trace.json"
    if not (watch.total and trace.exists()):
        results.add("memory", rehearsal.NOT_MEASURED, note=f"trace: {trace.exists()}, GPU: {watch.total}")
        return
    spans, samples, roles, total = read_spans(trace), watch.samples, watch.roles, watch.total
    results.add("GPU memory", total / 1e9, "GB")
    for phase in ("rollout", "train", "update_weights"):
        for role in (ENGINE, TRAINER, "total"):
            told(results, f"{role} while: {phase}", by_iteration(samples, roles, spans, phase, role), total)
    told(results, "total between rollout and train, least", released(samples, spans), total)


def told(results: Results, name: str, values: Mapping[int, int], total: int) -> None:
    """One row about one series."""
    if not values:
        return
    shares = [100 * value / total for value in values.values()]
    grown = 100 * creep(values) / total
    results.add(
        name, max(values.values()) / 1e9, "GB",
        f"{min(shares):.2f} to {max(shares):.2f} % of the GPU over {len(values)} iterations; "
        f"last minus second: {grown:+.3f} %",
    )  # fmt: skip


def checksums_said(run_dir: Path) -> dict[int, str]:
    """By weight version, what the run's engine said that it holds."""
    log = run_dir / "logs" / "controller.log"
    return {int(version): checksum for version, checksum in CHECKSUM.findall(log.read_text())}


def bare_broadcast(out: Path, num_bytes: int, group: Sequence[int]) -> float:
    """Seconds of one broadcast of so many bytes from the first rank to the others, which are on these GPUs, the median
    of 20. Raises RunFailed."""
    result = out / "bare-broadcast.txt"
    command = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(group)), "-m",
                     "gpu_bench.bare_broadcast", str(num_bytes), str(result), *map(str, group))  # fmt: skip
    run(command, env=environment(8), log_path=out / "bare-broadcast.log", deadline_s=120.0)
    return float(result.read_text())
