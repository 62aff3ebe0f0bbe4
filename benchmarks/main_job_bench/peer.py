"""TRL's side: a process of its own, whose figures come line by line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from main_job_bench.figures import GENERATION, LOG_PROBS, REST, TRAINING, UPDATE, Iteration, Run
from main_job_bench.processes import RunFailed, environment, python, run
from main_job_bench.sizes import Size


def why_not() -> str:
    """Why it cannot be measured here; nothing if it can."""
    return "" if importlib.util.find_spec("trl") else "trl is not installed"


def measure(size: Size, column: str, directory: Path, scratch: Path, *, num_threads: int, deadline_s: float) -> Run:
    """One run. ``scratch`` is a directory of its own. Raises RunFailed."""
    path = scratch / "iterations.jsonl"
    arguments = [str(directory), json.dumps(size.as_json()), str(num_threads), str(path), str(scratch / "trl")]
    began = run(
        python("-m", "main_job_bench.trl_child", *arguments),
        env=environment(num_threads, {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1"}),
        log_path=scratch / "log",
        deadline_s=deadline_s,
    )
    return parse(path.read_text(), column, began=began, warm_up=size.warm_up)


def parse(text: str, column: str, *, began: float, warm_up: int) -> Run:
    """What the process has written. Raises RunFailed."""
    head, *lines = [json.loads(line) for line in text.splitlines()] or [{}]
    if "started" not in head or len(lines) <= warm_up:
        raise RunFailed(f"it has told of {len(lines)} iterations")
    found = []
    for line in lines[warm_up:]:
        parts = {name: line["parts"].get(name, 0.0) for name in (GENERATION, LOG_PROBS, TRAINING)}
        parts[UPDATE] = 0.0
        parts[REST] = line["wall"] - sum(parts.values())
        found.append(Iteration(line["wall"], parts, line["samples"], line["tokens"], detail=line["parts"]))
    return Run(column, head["started"] - began, found)
