"""Numbers made of samples: statistics, pass rates, repetition. Numpy is imported where it is used: the controller, that
needs none, imports this module, too."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

_TAIL_CHARS = 10_000
_MIN_CHARS = 1_000
_REPETITIVE = 10.0


def compute_statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, max and min; nothing for no values."""
    import numpy as np

    if not len(values):
        return {}
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "median": float(np.median(array)),
        "max": float(array.max()),
        "min": float(array.min()),
    }


def dict_add_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same values with longer names."""
    return {f"{prefix}{name}": value for name, value in values.items()}


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those that are numbers, also of numpy and of torch (0-d): others cannot be drawn."""
    found = {}
    for name, value in metrics.items():
        if not isinstance(value, str | bytes) and hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0:
            found[str(name)] = float(value)
    return found


def compute_pass_rate(
    flat_rewards: Sequence[float], group_size: int, num_groups: int | None = None
) -> dict[str, float]:
    """``pass@k`` for the powers of two up to ``group_size``; a reward of 1 is a pass.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, "Evaluating Large Language Models Trained on
    Code"). Nothing if the rewards are not groups of ``group_size``.
    """
    import numpy as np

    groups = len(flat_rewards) // group_size if group_size else 0
    if not groups or groups * group_size != len(flat_rewards) or (num_groups is not None and num_groups != groups):
        return {}
    correct = (np.asarray(flat_rewards, dtype=np.float64).reshape(groups, group_size) == 1).sum(axis=1)
    rates = {}
    k = 1
    while k <= group_size:
        rates[f"pass@{k}"] = float(np.mean([_pass_at(group_size, int(c), k) for c in correct]))
        k *= 2
    return rates


def _pass_at(n: int, correct: int, k: int) -> float:
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def has_repetition(text: str) -> bool:
    """Whether the end of a long text repeats itself so much that it compresses tenfold."""
    if len(text) < _MIN_CHARS:
        return False
    tail = text[-_TAIL_CHARS:].encode()
    return len(tail) / len(zlib.compress(tail)) > _REPETITIVE


def compute_rollout_step(args: Any, rollout_id: int) -> int:
    """The x axis of rollout metrics: rollouts, or samples' optimizer steps with ``--wandb-always-use-train-step``."""
    if not getattr(args, "wandb_always_use_train_step", False):
        return rollout_id
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    return int(rollout_id * -(-samples // args.global_batch_size))  # the last step of a rollout may be smaller
