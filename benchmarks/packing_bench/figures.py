"""How good a schedule is, beside what no schedule can beat. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from miles.utils.bins import fewest_bins
from miles.utils.flops import flops_factors
from packing_bench.lengths import Lengths, Size
from packing_bench.sides import MODEL, Schedule

PAD = 128


@dataclass(frozen=True)
class Quality:
    """Of one schedule.

    Attributes:
        micro_batches: Of each rank.
        imbalance: Tokens of the heaviest rank over the mean, minus 1: how long the others wait at the end of a step.
        flops_imbalance: The same in FLOPs.
        waiting: The same where ranks meet in each micro-batch: tokens of the heaviest of each, added up, over the mean.
        padding: Of all tokens computed, those that fill each micro-batch up to a multiple of 128.
        fullest: Tokens of the largest micro-batch over the budget.
    """

    micro_batches: float
    imbalance: float
    flops_imbalance: float
    waiting: float
    padding: float
    fullest: float


def quality(schedule: Schedule, lengths: Lengths, size: Size) -> Quality:
    """Raises ValueError if a sample is missing or there twice, or ranks differ in their number of micro-batches."""
    counts = Counter(place for mine in schedule for micro_batch in mine for place in micro_batch)
    if set(counts) != set(range(size.samples)) or max(counts.values()) > 1:
        raise ValueError("not every sample is there exactly once")
    if len({len(mine) for mine in schedule}) != 1 or len(schedule) != size.ranks:
        raise ValueError("ranks differ in their number of micro-batches")
    per_token, per_square = flops_factors(MODEL)
    flops = per_token * lengths + per_square * lengths.astype(np.float64) ** 2
    tokens = np.array([[lengths[micro_batch].sum() for micro_batch in mine] for mine in schedule])
    by_rank_flops = np.array([flops[[i for micro_batch in mine for i in micro_batch]].sum() for mine in schedule])
    padded = -(-tokens // PAD) * PAD
    return Quality(
        micro_batches=tokens.shape[1],
        imbalance=_over_mean(tokens.sum(axis=1)),
        flops_imbalance=_over_mean(by_rank_flops),
        waiting=float(tokens.max(axis=0).sum() / (tokens.sum() / size.ranks) - 1),
        padding=float(1 - tokens.sum() / padded.sum()),
        fullest=float(tokens.max() / size.budget),
    )


def bound(lengths: Lengths, size: Size) -> Quality:
    """What no schedule with dynamic batches can beat."""
    per_token, per_square = flops_factors(MODEL)
    flops = per_token * lengths + per_square * lengths.astype(np.float64) ** 2
    mean = lengths.sum() / size.ranks
    heaviest = max(-(-int(lengths.sum()) // size.ranks), int(lengths.max()))
    count = -(-fewest_bins(lengths, size.budget) // size.ranks)
    # While the longest sample runs, the other ranks have one micro-batch, within the budget.
    beside = int(lengths.max()) + (size.ranks - 1) * size.budget
    together = max(heaviest, int(lengths.max()) + (int(lengths.sum()) - beside) / size.ranks)
    return Quality(
        micro_batches=count,
        imbalance=heaviest / mean - 1,
        flops_imbalance=max(float(flops.max()) / (flops.sum() / size.ranks) - 1, 0.0),
        waiting=together / mean - 1,
        padding=0.0,
        fullest=max(float(lengths.max()) / size.budget, mean / count / size.budget),
    )


def _over_mean(values: np.ndarray[tuple[int, ...], np.dtype[np.number]]) -> float:
    return float(values.max() / values.mean() - 1)
