"""How far two runs of the same recorded rollouts are apart. Pure, but for reading weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.tracking.metrics_file import read_metrics

METRICS = ("train/grad_norm", "train/loss", "train/entropy_loss", "rollout/log_probs")


def rollout_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Of a run's metrics; none if there is no file yet."""
    path = run_dir / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["event"] == "rollout"] if path.exists() else []


def apart(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str
) -> tuple[float, float] | None:
    """The differences of a metric in the first rollout and at most in all, as shares of the largest value of ``theirs``
    (of a loss, which is about 0, as they are); None where one has it and the other does not, or in another number of
    rollouts."""
    if len(ours) != len(theirs) or any(name not in row for row in (*ours, *theirs)) or not theirs:
        return None
    scale = 1.0 if name == "train/loss" else max(abs(float(row[name])) for row in theirs) or 1.0
    found = [abs(float(a[name]) - float(b[name])) / scale for a, b in zip(ours, theirs, strict=True)]
    return found[0], max(math.inf if math.isnan(value) else value for value in found)


def weights_apart(
    ours: Iterable[tuple[str, Any]], theirs: Mapping[str, Any], first: Mapping[str, Any]
) -> tuple[float, float]:
    """The distance of two sets of weights, and how far ``theirs`` have come from ``first``, as shares of ``theirs``.
    Raises KeyError for a name that they have not all."""
    between = moved = size = 0.0
    for name, value in ours:
        mine, other, start = value.float(), theirs[name].float(), first[name].float()
        between += float((mine - other).square().sum())
        moved += float((other - start).square().sum())
        size += float(other.square().sum())
    return math.sqrt(between / size), math.sqrt(moved / size)


def weights(directory: Path) -> dict[str, Any]:
    """Of a Hugging Face directory, in host memory."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}
