"""From the lines of ``metrics.jsonl`` to iterations. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from main_job_bench.figures import GENERATION, LOG_PROBS, REST, TRAINING, UPDATE, Iteration

_LOG_PROBS = "perf/log_probs_time"
_RESPONSE = "rollout/response_len/mean"


class MetricsMissing(Exception):
    """A line lacks what has to be known."""


def iterations(rows: Sequence[Mapping[str, Any]], *, samples: int, warm_up: int) -> list[Iteration]:
    """Those that are measured.

    An iteration's time is what passed since the last one's line was written, evaluations and checkpoints taken out:
    what happens between iterations counts, too. Raises MetricsMissing.
    """
    if warm_up < 1:
        raise ValueError("the first iteration has no line before it")
    found, last, evaluation = [], None, 0.0
    for row in rows:
        if row["event"] == "eval":
            evaluation += row.get("perf/eval_time", 0.0)
            continue
        if row["event"] != "rollout":
            continue
        if last is not None:
            found.append(_iteration(row, row["time"] - last, evaluation, samples))
        last, evaluation = row["time"], 0.0
    return found[warm_up - 1 :]


def first_began(rows: Sequence[Mapping[str, Any]]) -> float:
    """When the first iteration began, in seconds since the epoch. Raises MetricsMissing."""
    for row in rows:
        if row["event"] == "rollout":
            return float(row["time"] - _needed(row, "perf/step_time"))
    raise MetricsMissing("no iteration was finished")


def _iteration(row: Mapping[str, Any], since_last: float, evaluation: float, samples: int) -> Iteration:
    saving = row.get("perf/save_time", 0.0)
    wall = since_last - evaluation - saving
    log_probs = row.get(_LOG_PROBS) or 0.0
    parts = {
        GENERATION: _needed(row, "perf/rollout_time"),
        LOG_PROBS: log_probs,
        TRAINING: _needed(row, "perf/train_time") - log_probs,
        UPDATE: _needed(row, "perf/update_weights_time"),
    }
    return Iteration(
        wall=wall,
        parts={**parts, REST: wall - sum(parts.values())},
        samples=samples,
        tokens=_needed(row, _RESPONSE) * samples,
        detail={
            name.removeprefix("perf/").removesuffix("_time"): value
            for name, value in row.items()
            if name.startswith("perf/") and name.endswith("_time") and value is not None
        },
        apart={"evaluation": evaluation, "checkpoint": saving},
    )


def _needed(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if value is None:
        raise MetricsMissing(f"the line of rollout {row.get('rollout_id')} has no {name}")
    return float(value)
