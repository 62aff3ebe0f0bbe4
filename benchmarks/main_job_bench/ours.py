"""Our side: ``python train.py`` as a user calls it; its figures come from the run's ``metrics.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from main_job_bench import our_metrics
from main_job_bench.figures import Run
from main_job_bench.processes import ROOT, RunFailed, environment, python, run
from main_job_bench.sizes import Size
from main_job_bench.workload import MODEL_DIR, PROMPTS

_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Layout:
    """How many ranks train and how many engines generate, on the same cores in turn; a thread for each."""

    column: str
    ranks: int
    engines: int


def flags(size: Size, layout: Layout, directory: Path, run_dir: Path, *, generate: str) -> list[str]:
    """The command line after ``train.py``. Pure."""
    pairs = {
        "--train-backend": "megatron",
        "--device": "cpu",
        "--run-dir": run_dir,
        "--actor-num-nodes": 1,
        "--actor-num-gpus-per-node": layout.ranks,
        "--rollout-num-gpus-per-engine": layout.ranks // layout.engines,
        "--hf-checkpoint": directory / MODEL_DIR,
        "--prompt-data": directory / PROMPTS,
        "--input-key": "prompt",
        "--label-key": "label",
        "--metadata-key": "metadata",
        "--num-rollout": size.num_rollouts,
        "--rollout-batch-size": size.prompts,
        "--n-samples-per-prompt": size.group,
        "--num-steps-per-rollout": size.steps,
        "--global-batch-size": size.batch,
        "--rollout-max-response-len": size.longest,
        "--rollout-temperature": "1.0",
        "--custom-generate-function-path": f"main_job_bench.hooks.{generate}",
        "--rm-type": "random",
        "--max-tokens-per-gpu": size.max_tokens,
        "--advantage-estimator": "grpo",
        "--eps-clip": "0.2",
        "--lr": "1e-6",
        "--lr-decay-style": "constant",
        "--weight-decay": "0.1",
        "--adam-beta1": "0.9",
        "--adam-beta2": "0.98",
        "--clip-grad": "1.0",
    }
    switches = ["--colocate", "--use-dynamic-batch-size"]
    return [*(str(word) for pair in pairs.items() for word in pair), *switches]


def why_not() -> str:
    """Why it cannot be measured here; nothing if it can."""
    return "" if (ROOT / "train.py").is_file() else "there is no train.py"


@dataclass(frozen=True)
class Finished:
    """A job that has ended well: when it began (seconds since the epoch), and the lines of its ``metrics.jsonl``."""

    began: float
    rows: list[dict[str, Any]]


def run_job(
    size: Size, layout: Layout, directory: Path, scratch: Path, *, generate: str, deadline_s: float
) -> Finished:
    """One job, with a function of ``hooks``. ``scratch`` is a directory of its own. Raises RunFailed."""
    run_dir = scratch / "run"
    command = python(str(ROOT / "train.py"), *flags(size, layout, directory, run_dir, generate=generate))
    began = run(command, env=environment(1), log_path=scratch / "log", deadline_s=deadline_s)
    rows = [json.loads(line) for line in (run_dir / _METRICS).read_text().splitlines()]
    done = sum(row["event"] == "rollout" for row in rows)
    if done != size.num_rollouts:
        raise RunFailed(f"{_METRICS} has {done} of {size.num_rollouts} iterations")
    return Finished(began, rows)


def measure(size: Size, layout: Layout, directory: Path, scratch: Path, *, deadline_s: float) -> Run:
    """One run. Raises RunFailed."""
    done = run_job(size, layout, directory, scratch, generate="generate", deadline_s=deadline_s)
    try:
        found = our_metrics.iterations(done.rows, samples=size.samples, warm_up=size.warm_up)
        start_up = our_metrics.first_began(done.rows) - done.began
    except our_metrics.MetricsMissing as error:
        raise RunFailed(str(error)) from error
    return Run(layout.column, start_up, found)
