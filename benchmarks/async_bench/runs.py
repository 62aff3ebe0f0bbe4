"""One run of one way of training, by the entry points that a user has; and what its files say of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from miles.tracking.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parents[1]
GROUPS, SAMPLES = 8, 4
TIMEOUT_S = 400.0
FULLY = (
    "--fully-async --max-weight-staleness 2 --async-data-buffer-capacity-factor 1 "
    "--async-unused-samples-handler retry --async-max-concurrent-samples 32"
)
WAYS = {
    "train.py": ("train.py", ""),
    "train_async.py, one step ahead": ("train_async.py", ""),
    "train_async.py --fully-async": ("train_async.py", FULLY),
}
"""By name: the entry point, and flags."""
Times = list[tuple[float, float]]


class RunFailed(Exception):
    """A run did not end well; the text is the end of its output."""


@dataclass(frozen=True)
class Sizes:
    """Of a run.

    Attributes:
        rollouts: How many; the first is not measured.
        short, long: Seconds of an answer; each 32nd, one of a rollout, is long.
        step: Seconds that a training step sleeps, beside its own work.
    """

    rollouts: int = 9
    short: float = 0.5
    long: float = 2.0
    step: float = 1.6


@dataclass(frozen=True)
class Figures:
    """Of one run, from the second rollout on.

    Attributes:
        seconds: Wall-clock per 1,000 trained samples.
        trainer_idle: Share of that time in which the trainer did not work on a rollout.
        engines_idle: Share in which engines had no request.
        train_s: Mean seconds of the trainer per rollout.
    """

    seconds: float
    trainer_idle: float
    engines_idle: float
    train_s: float


@contextmanager
def engine(model: Path, sizes: Sizes, core: int) -> Iterator[str]:
    """Its address."""
    argv = [sys.executable, "-m", "async_bench.engine", "--model", str(model), "--core", str(core)]
    argv += ["--short", str(sizes.short), "--long", str(sizes.long), "--every", str(GROUPS * SAMPLES)]
    with subprocess.Popen(
        argv, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(30)


def run(way: str, model: Path, scratch: Path, sizes: Sizes, cores: Sequence[int]) -> Figures:
    """Train, with the trainer on the first core and the engine on the last. ``scratch`` holds ``prompts.jsonl``, and
    gets a directory of the run.

    Raises:
        RunFailed: It ended with an error, or did not end.
    """
    entry, flags = WAYS[way]
    run_dir = Path(tempfile.mkdtemp(dir=scratch))
    with engine(model, sizes, cores[-1]) as address:
        argv = [
            sys.executable, str(ROOT / entry), "--hf-checkpoint", str(model),
            "--prompt-data", str(scratch / "prompts.jsonl"), "--input-key", "prompt", "--label-key", "label",
            "--rm-type", "random", "--lr", "1e-4",
            "--run-dir", str(run_dir), "--num-rollout", str(sizes.rollouts), "--rollout-batch-size", str(GROUPS),
            "--n-samples-per-prompt", str(SAMPLES), "--rollout-max-response-len", "8",
            "--actor-num-gpus-per-node", "1", "--rollout-external", "--rollout-external-engine-addrs", address,
            "--custom-megatron-init-path", "async_bench.trainer_hooks.pin",
            "--custom-megatron-before-train-step-hook-path", "async_bench.trainer_hooks.lengthen", *flags.split(),
        ]  # fmt: skip
        env = _environment() | {"ASYNC_BENCH_CORE": str(cores[0]), "ASYNC_BENCH_STEP_S": str(sizes.step)}
        with subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                output, _ = process.communicate(timeout=60)
    if process.returncode:
        raise RunFailed(f"{way} ended with {process.returncode}\n{output[-3000:]}")
    return figures(run_dir)


def figures(run_dir: Path) -> Figures:
    """What metrics.jsonl and trace.json say of the run."""
    times = [row["time"] for row in read_metrics(run_dir / "metrics.jsonl") if row["event"] == "rollout"]
    window = (times[0], times[-1])
    length, samples = window[1] - window[0], (len(times) - 1) * GROUPS * SAMPLES
    events = [event for event in json.loads((run_dir / "trace.json").read_text()) if event["ph"] == "X"]
    trainer = _spans(events, pid=2, name="train")
    training = _share(trainer, window)
    return Figures(
        seconds=length / samples * 1000,
        trainer_idle=1 - training,
        engines_idle=1 - _share(_spans(events, pid=3, name="generate"), window),
        train_s=training * length / (len(times) - 1),
    )


def _spans(events: list[dict[str, object]], *, pid: int, name: str) -> Times:
    found = [event for event in events if event["pid"] == pid and event["name"] == name]
    return [(float(str(e["ts"])) / 1e6, (float(str(e["ts"])) + float(str(e["dur"]))) / 1e6) for e in found]


def _share(spans: Times, window: tuple[float, float]) -> float:
    """Of the window. Spans of one track do not overlap."""
    begin, end = window
    return sum(max(0.0, min(e, end) - max(b, begin)) for b, e in spans) / (end - begin)


def _environment() -> dict[str, str]:
    paths = [HERE, ROOT / "tests", ROOT, *(ROOT / name for name in ("agents", "controller", "launcher"))]
    path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
