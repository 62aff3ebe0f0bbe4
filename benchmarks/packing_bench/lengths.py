"""Rollouts of several kinds: how long their samples are. Pure, the same for a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How much there is to schedule. ``budget``: tokens of a micro-batch, also the longest sample but for a giant."""

    samples: int
    ranks: int
    budget: int = 16_384
    micro_batch_size: int = 4


FULL = Size(samples=65_536, ranks=512)
QUICK = Size(samples=1_024, ranks=16)

KINDS = {
    "long tail": "lognormal, median 1,100, a twentieth longer than 5,700, cut at the budget",
    "uniform": "evenly from 100 tokens to the budget",
    "two humps": "four fifths around 500, one fifth from three quarters of the budget to all of it",
    "all equal": "a quarter of the budget each",
    "one giant": "evenly from 100 to 4,000, and one sample of three budgets",
}


def lengths(kind: str, size: Size, seed: int = 0) -> Lengths:
    """Tokens of each sample."""
    rng = np.random.default_rng(seed)
    count, budget = size.samples, size.budget
    if kind == "long tail":
        return np.clip(rng.lognormal(7, 1, count), 16, budget).astype(np.int64)
    if kind == "uniform":
        return rng.integers(100, budget + 1, count)
    if kind == "two humps":
        long = rng.integers(budget * 3 // 4, budget + 1, count)
        return np.where(rng.random(count) < 0.8, rng.integers(200, 800, count), long)
    if kind == "all equal":
        return np.full(count, budget // 4, np.int64)
    found = rng.integers(100, 4_000, count)
    found[count // 3] = 3 * budget
    return found
