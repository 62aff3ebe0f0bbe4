"""Putting sequences into bins: by capacity (first fit decreasing), or into a number of even parts (Karmarkar-Karp).

Pure functions of numbers. A part is a list of places in what was given.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most ``capacity`` tokens: the longest sequence first, each into the first bin with room.

    A sequence that is longer than a bin gets one of its own. Needs at most 11/9 of the fewest bins, and one more
    (Johnson, 1973).
    """
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = room[: len(bins)] >= lengths[place]
        at = int(fits.argmax()) if fits.any() else len(bins)
        if at == len(bins):
            bins.append([])
            room[at] = capacity
        bins[at].append(place)
        room[at] -= lengths[place]
    return bins


def split_in_two(places: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[int]]:
    """Two halves of about the same weight: the heaviest first, each to the lighter half. Neither is empty if there are
    two places or more."""
    halves: tuple[list[int], list[int]] = ([], [])
    sums = [0.0, 0.0]
    for place in sorted(places, key=lambda i: (-weights[i], i)):
        lighter = 0 if (sums[0], len(halves[0])) <= (sums[1], len(halves[1])) else 1
        halves[lighter].append(place)
        sums[lighter] += weights[place]
    return halves


def get_seqlen_balanced_partitions(
    seqlen_list: Sequence[float], k_partitions: int, equal_size: bool
) -> list[list[int]]:
    """``k_partitions`` parts whose sums are close to each other, by the largest differencing method (Karmarkar and
    Karp, 1982).

    Args:
        seqlen_list: Weight of each item: tokens, or FLOPs.
        k_partitions: Parts to make.
        equal_size: All parts get the same number of items, which must be a multiple of ``k_partitions``.

    Raises:
        ValueError: Fewer items than parts, or a number of items that cannot be dealt out evenly.
    """
    count = len(seqlen_list)
    if k_partitions < 1 or count < k_partitions:
        raise ValueError(f"{count} items cannot be put into {k_partitions} parts")
    if equal_size and count % k_partitions:
        raise ValueError(f"{count} items cannot be dealt out evenly to {k_partitions} parts")
    order = sorted(range(count), key=lambda i: (-seqlen_list[i], i))
    deal = k_partitions if equal_size else 1
    heap: list[tuple[float, int, list[_Part]]] = []
    for number, start in enumerate(range(0, count, deal)):
        parts: list[_Part] = [(float(seqlen_list[i]), [i]) for i in order[start : start + deal]]
        parts += [(0.0, []) for _ in range(k_partitions - deal)]
        heap.append((-_spread(parts), number, parts))
    heapq.heapify(heap)
    serial = len(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = _merge(first, second)
        heapq.heappush(heap, (-_spread(merged), serial, merged))
        serial += 1
    return _without_empty([sorted(items) for _, items in heap[0][2]], seqlen_list)


_Part = tuple[float, list[int]]
"""Sum and items. Lists of parts are sorted, the largest sum first."""


def _spread(parts: list[_Part]) -> float:
    return parts[0][0] - parts[-1][0]


def _merge(first: list[_Part], second: list[_Part]) -> list[_Part]:
    """The largest of one with the smallest of the other, and so on: their differences cancel."""
    merged = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(first, reversed(second), strict=True)]
    return sorted(merged, key=lambda part: -part[0])


def _without_empty(parts: list[list[int]], weights: Sequence[float]) -> list[list[int]]:
    """Items of weight 0 may leave parts empty: these get the lightest item of the part that has the most."""
    for part in parts:
        if not part:
            donor = max(parts, key=len)
            lightest = min(donor, key=lambda i: weights[i])
            donor.remove(lightest)
            part.append(lightest)
    return parts
