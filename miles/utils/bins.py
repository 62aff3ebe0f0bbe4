"""Which item goes into which bin: the algorithms below ``seqlen_balancing`` and ``dp_schedule``, on numpy arrays.

Pure, and the same for the same input. An answer is an array of labels: the bin of each item. Items that weigh alike are
taken in their order.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.number[Any]]
Lengths = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]

KARMARKAR_KARP_CELLS = 1 << 21
"""Items times bins up to which Karmarkar and Karp's method takes milliseconds. Beyond, bins hold so many items, or are
so many, that it is not ahead of the others."""
TIES = 1e-3
"""What bins may be heavier by, as a part of the mean, without being thought worse."""
PACK_TRIES = 8
"""Numbers of bins for which even ones are tried."""


def heaviest_first(weights: Weights, count: int, limit: int | None = None) -> Labels:
    """The heaviest item first, each into the lightest of ``count`` bins that has fewer than ``limit`` items.

    No bin is heavier than 4/3 of the best there is (Graham, 1969, without limit).
    """
    order = descending(weights)
    ordered = weights[order].tolist()
    first = min(count, len(ordered))
    places = list(range(first))
    heap = [(ordered[i], i) for i in range(first)] if first == count else []
    heapq.heapify(heap)
    used = [1] * count if limit is not None else []
    for weight in ordered[first:]:
        total, at = heap[0]
        places.append(at)
        if limit is not None:
            used[at] += 1
            if used[at] >= limit:
                heapq.heappop(heap)
                continue
        heapq.heapreplace(heap, (total + weight, at))
    return _unsorted(order, places)


def heaviest_first_within(weights: Weights, lengths: Lengths, count: int, capacity: int) -> Labels | None:
    """As ``heaviest_first``, each into the lightest bin that has room for its length.

    Longer items than ``capacity`` get bins of their own. A bin that once had no room gets nothing more. None: there was
    no bin left for an item.
    """
    order = descending(weights)
    rooms = [capacity] * count
    heap = [(0.0, number) for number in range(count)]
    places = []
    for weight, length in zip(weights[order].tolist(), lengths[order].tolist(), strict=True):
        while heap and rooms[heap[0][1]] < min(length, capacity):
            heapq.heappop(heap)
        if not heap:
            return None
        total, at = heap[0]
        places.append(at)
        rooms[at] -= length
        heapq.heapreplace(heap, (total + weight, at))
    return _unsorted(order, places)


MOST_LAYERS = 256
"""Beyond that differencing by layers is left out: its time grows with the square of the layers, and with so many items
in each bin the heaviest-first rule is as even."""


def differencing_by_layers(weights: Weights, count: int) -> Labels:
    """Layers of ``count`` items, the heaviest first; the two layers that differ most within are laid upon each other,
    heaviest on lightest, until one is left: each bin has one item of each layer.

    Karmarkar and Karp's method for parts of equal size (Michiels, Korst, Aarts and van Leeuwen, 2003), in as many steps
    as there are layers. Few items that are much heavier than all others spoil it.
    """
    order = descending(weights)
    depth = max(1, -(-len(order) // count))
    items = np.full(depth * count, -1, np.int64)
    items[: len(order)] = order
    padded = np.zeros(depth * count, weights.dtype)
    padded[: len(order)] = weights[order]
    heap: list[tuple[float, int, Weights, list[Labels]]] = [
        (float(sums[-1] - sums[0]), number, sums, [layer])
        for number, (sums, layer) in enumerate(zip(padded.reshape(-1, count), items.reshape(-1, count), strict=True))
    ]
    heapq.heapify(heap)
    serial = depth
    while len(heap) > 1:
        _, _, sums, layers = heapq.heappop(heap)
        _, _, other_sums, others = heapq.heappop(heap)
        sums = sums + other_sums[::-1]
        turn = descending(sums)
        sums = sums[turn]
        layers = [layer[turn] for layer in layers] + [layer[::-1][turn] for layer in others]
        heapq.heappush(heap, (float(sums[-1] - sums[0]), serial, sums, layers))
        serial += 1
    labels = np.zeros(len(order), np.int64)
    numbers = np.arange(count)
    for layer in heap[0][3]:
        real = layer >= 0
        labels[layer[real]] = numbers[real]
    return labels


def karmarkar_karp_labels(weights: Weights, count: int) -> Labels:
    """The largest differencing method (Karmarkar and Karp, 1982), for bins of any number of items.

    Takes time and memory in proportion to items times bins.
    """
    small = np.uint16 if count <= np.iinfo(np.uint16).max else np.int64
    sums_of = [weights[item : item + 1] for item in range(len(weights))]  # the other bins are empty
    made_of: list[tuple[int, int, npt.NDArray[Any]]] = []  # of what comes after the items: two, and the turn
    heap = [(-float(weights[item]), item) for item in descending(weights).tolist()]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[1], heapq.heappop(heap)[1]
        sums = np.zeros(count, weights.dtype)
        sums[: len(sums_of[first])] = sums_of[first]
        sums[count - len(sums_of[second]) :] += sums_of[second][::-1]
        turn = descending(sums)
        sums_of[first] = sums_of[second] = weights[:0]
        sums_of.append(sums[turn])
        made_of.append((first, second, turn.astype(small)))
        heapq.heappush(heap, (float(sums[turn[-1]] - sums[turn[0]]), len(sums_of) - 1))
    labels = np.zeros(len(weights), np.int64)
    bins_of = {len(sums_of) - 1: np.arange(count)}  # where each bin of a state ends up
    for state in range(len(sums_of) - 1, -1, -1):
        bins = bins_of.pop(state)
        if state < len(weights):
            labels[state] = bins[0]
            continue
        first, second, turn = made_of[state - len(weights)]
        before = np.empty_like(bins)
        before[turn] = bins
        bins_of[first], bins_of[second] = before, before[::-1]
    return labels


def balanced(weights: Weights, count: int, limit: int | None = None) -> Labels:
    """``count`` bins that weigh about the same: the best of the methods above.

    With ``limit``, no bin has more items than that; ``count * limit`` is at least the number of items.
    """
    if len(weights) > MOST_LAYERS * count:
        best = heaviest_first(weights, count, limit)
    else:
        best = differencing_by_layers(weights, count)
    heaviest = _heaviest(best, weights, count)
    slack = TIES * float(weights.sum()) / count if limit is not None else 0.0  # layers also keep step: see dp_schedule
    for labels in _others(weights, count, limit):
        if (found := _heaviest(labels, weights, count)) < heaviest - slack:
            best, heaviest = labels, found
    return best


def _others(weights: Weights, count: int, limit: int | None) -> Iterator[Labels]:
    yield heaviest_first(weights, count, limit)
    if limit is None and len(weights) * count <= KARMARKAR_KARP_CELLS:
        labels = karmarkar_karp_labels(weights, count)
        if len(np.unique(labels)) == min(count, len(weights)):  # items of no weight may leave bins empty
            yield labels


def best_fit_decreasing(lengths: Lengths, capacity: int) -> tuple[Labels, int]:
    """The longest first, each into the fullest bin that has room, else into a new one; also how many bins there are.

    At most 11/9 of the fewest possible, and one (Johnson, 1973). Longer ones than ``capacity`` get bins of their own.
    """
    order = descending(lengths)
    places = []
    rooms: list[tuple[int, int]] = []  # room and number of bins that are not full, the fullest first
    count = 0
    for length in lengths[order].tolist():
        at = bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, place = rooms.pop(at)
        else:
            room, place = capacity, count
            count += 1
        places.append(place)
        if room > length:
            insort(rooms, (room - length, place))
    return _unsorted(order, places), count


def pack(lengths: Lengths, capacity: int, multiple: int = 1, at_least: int = 1) -> tuple[Labels, int]:
    """Bins of at most ``capacity``, as few as were found in a multiple of ``multiple`` and ``at_least``, and even.

    Longer items than ``capacity`` get bins of their own. Some bins are empty if there are fewer items than bins.

    Returns:
        Labels, and the number of bins.
    """
    fewest = _round_up(max(fewest_bins(lengths, capacity), at_least), multiple)
    if labels := _even(lengths, capacity, fewest):
        return labels[0], fewest
    labels_found, found = best_fit_decreasing(lengths, capacity)
    count = max(_round_up(found, multiple), fewest)
    for fewer in [*range(fewest + multiple, count, multiple)[: PACK_TRIES - 1], count] if count > fewest else []:
        if labels := _even(lengths, capacity, fewer):
            return labels[0], fewer
    return split_heaviest(labels_found, lengths, found, count), count


def fewest_bins(lengths: Lengths, capacity: int) -> int:
    """A lower bound: by the sum, and because no two items that fill more than half of a bin fit into one."""
    over = lengths[lengths >= capacity]
    rest = lengths[lengths < capacity]
    return len(over) + max(-(-int(rest.sum()) // capacity), int((2 * rest > capacity).sum()))


def _even(lengths: Lengths, capacity: int, count: int) -> tuple[Labels] | None:
    """``count`` bins by weight, if that keeps them within capacity."""
    if count >= len(lengths):
        return (np.arange(len(lengths)),)
    over = lengths >= capacity
    alone = int(over.sum())
    rest = lengths[~over]
    if not len(rest):
        return None
    labels = np.empty(len(lengths), np.int64)
    labels[over] = np.arange(alone)
    few_layers = len(rest) <= MOST_LAYERS * (count - alone)
    for method in (differencing_by_layers, heaviest_first) if few_layers else (heaviest_first,):
        found = method(rest, count - alone)
        if _heaviest(found, rest, count - alone) <= capacity:
            labels[~over] = alone + found
            return (labels,)
    return None


def split_heaviest(labels: Labels, lengths: Weights, found: int, count: int) -> Labels:
    """``count`` bins from ``found``: the heaviest that has two items is split in two, again and again."""
    if count == found:
        return labels
    labels = labels.copy()
    bins = members(labels, found)
    heap = [(-float(lengths[bin_].sum()), number) for number, bin_ in enumerate(bins) if len(bin_) > 1]
    heapq.heapify(heap)
    for new in range(found, count):
        if not heap:
            break  # what is left is empty
        number = heapq.heappop(heap)[1]
        bin_ = np.array(bins[number])
        halves = heaviest_first(lengths[bin_], 2)
        labels[bin_[halves == 1]] = new
        bins.append(bin_[halves == 1].tolist())
        bins[number] = bin_[halves == 0].tolist()
        for part in (number, new):
            if len(bins[part]) > 1:
                heapq.heappush(heap, (-float(lengths[bins[part]].sum()), part))
    return labels


def members(labels: Labels, count: int) -> list[list[int]]:
    """The items of each bin, in ascending order."""
    order = np.argsort(labels, kind="stable")
    bounds = [0, *np.cumsum(np.bincount(labels, minlength=count)).tolist()]
    items = order.tolist()
    return [items[begin:end] for begin, end in pairwise(bounds)]


def sums(labels: Labels, weights: Weights, count: int) -> npt.NDArray[np.float64]:
    """What each bin weighs. Exact for whole numbers up to 2**53."""
    return np.bincount(labels, weights=weights, minlength=count).astype(np.float64)


def descending(weights: Weights) -> Labels:
    """The order of items, the heaviest first."""
    return np.argsort(-weights, kind="stable")


def _heaviest(labels: Labels, weights: Weights, count: int) -> float:
    return float(sums(labels, weights, count).max())


def _unsorted(order: Labels, places: list[int]) -> Labels:
    labels = np.empty(len(order), np.int64)
    labels[order] = places
    return labels


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
