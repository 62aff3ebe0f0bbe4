"""Ways to make a schedule: ours with each flag, naive ones, and partitioning methods as they are commonly written.

Each gives every rank's micro-batches, as places in the rollout, the same number for all ranks.
"""

from __future__ import annotations

import heapq
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from miles.utils.dp_schedule import ScheduleConfig, build_dp_schedule, build_forward_schedule
from miles.utils.flops import sample_costs
from packing_bench.lengths import Lengths, Size

Schedule = list[list[list[int]]]
MODEL = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
}
"""Qwen3-4B, whose FLOPs are meant where FLOPs are counted."""


def ours(lengths: Lengths, size: Size, *, dynamic: bool, balance: bool = False, by_flops: bool = False) -> Schedule:
    """As the rollout manager does it for each rollout: micro-batches of training and of the passes without gradient."""
    args = SimpleNamespace(
        use_dynamic_batch_size=dynamic,
        max_tokens_per_gpu=size.budget,
        micro_batch_size=size.micro_batch_size,
        balance_data=balance,
        hf_config=MODEL,
    )
    schedule = build_dp_schedule(
        args,
        ScheduleConfig(dp_size=size.ranks),
        lengths.tolist(),
        global_batch_size=size.samples,
        rollout_indices=list(range(size.samples)),
        weights=sample_costs(args, lengths) if by_flops else None,
    )
    if dynamic:
        by_rank = [lengths[partition].tolist() for partition in schedule.partitions]
        build_forward_schedule(by_rank, size.budget, like=schedule.micro_batch_indices)
    return [
        [[partition[i] for i in micro_batch] for micro_batch in mine]
        for partition, mine in zip(schedule.partitions, schedule.micro_batch_indices, strict=True)
    ]


def contiguous(lengths: Lengths, size: Size) -> Schedule:
    """Each rank the next samples of the rollout, as many as the others."""
    each = size.samples // size.ranks
    return as_they_come([list(range(r * each, (r + 1) * each)) for r in range(size.ranks)], lengths, size)


def round_robin(lengths: Lengths, size: Size) -> Schedule:
    """Samples are dealt to the ranks in turn."""
    return as_they_come([list(range(r, size.samples, size.ranks)) for r in range(size.ranks)], lengths, size)


def plain_karmarkar_karp(lengths: Lengths, size: Size) -> Schedule:
    """Equal numbers of samples by differencing, in plain Python: a heap of states, each a list of sums and items."""
    order = sorted(range(size.samples), key=lambda i: -lengths[i])
    values = lengths.tolist()
    heap = []
    for number, begin in enumerate(range(0, size.samples, size.ranks)):
        state = [(values[i], [i]) for i in order[begin : begin + size.ranks]]
        heap.append((state[-1][0] - state[0][0], number, state))
    heapq.heapify(heap)
    for number in itertools.count(len(heap)):
        if len(heap) == 1:
            break
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = [(a + c, b + d) for (a, b), (c, d) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return as_they_come([items for _, items in heap[0][2]], lengths, size)


def free_karmarkar_karp(lengths: Lengths, size: Size) -> Schedule:
    """The same with parts of any number of samples: a state for each sample."""
    values = lengths.tolist()
    empty: list[tuple[int, list[int]]] = [(0, [])] * (size.ranks - 1)
    heap = [(-value, number, [(value, [number]), *empty]) for number, value in enumerate(values)]
    heapq.heapify(heap)
    for number in itertools.count(len(heap)):
        if len(heap) == 1:
            break
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = [(a + c, b + d) for (a, b), (c, d) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return as_they_come([items for _, items in heap[0][2]], lengths, size)


def prtpy(method: str) -> Callable[[Lengths, Size], Schedule]:
    """A method of the package prtpy."""

    def run(lengths: Lengths, size: Size) -> Schedule:
        package = importlib.import_module("prtpy")
        items = dict(enumerate(lengths.tolist()))
        parts = package.partition(getattr(package.partitioning, method), size.ranks, items)
        return as_they_come(parts, lengths, size)

    return run


def as_they_come(parts: Sequence[Sequence[int]], lengths: Lengths, size: Size) -> Schedule:
    """Micro-batches of each rank's samples in their order: a new one when the budget is full.

    Ranks that need fewer than others take part in the last ones with nothing.
    """
    values = lengths.tolist()
    schedule = []
    for part in parts:
        mine: list[list[int]] = []
        room = -1
        for place in part:
            if values[place] > room:
                mine.append([])
                room = size.budget
            mine[-1].append(place)
            room -= values[place]
        schedule.append(mine)
    most = max(map(len, schedule))
    return [mine + [[] for _ in range(most - len(mine))] for mine in schedule]


def _ours(**flags: bool) -> Callable[[Lengths, Size], Schedule]:
    return lambda lengths, size: ours(lengths, size, **flags)


OURS = {
    "dynamic, `--balance-data`": _ours(dynamic=True, balance=True),
    "dynamic": _ours(dynamic=True),
    "dynamic, `--balance-by-flops`": _ours(dynamic=True, by_flops=True),
    "static, `--balance-data`": _ours(dynamic=False, balance=True),
    "static": _ours(dynamic=False),
}
PEERS = {
    "naive: contiguous": contiguous,
    "naive: round-robin": round_robin,
    "plain Karmarkar-Karp, equal numbers": plain_karmarkar_karp,
    "prtpy: greedy": prtpy("greedy"),
}
SLOW_PEERS = {
    "plain Karmarkar-Karp, any numbers": free_karmarkar_karp,
    "prtpy: Karmarkar-Karp": prtpy("karmarkar_karp"),
    "prtpy: multifit": prtpy("multifit"),
}
"""A minute and more each for a full size: measured once, for one kind of rollout."""


def why_missing(side: str) -> str:
    """Why a side cannot be measured here; empty if it can."""
    if side.startswith("prtpy") and importlib.util.find_spec("prtpy") is None:
        return "prtpy is not installed"
    return ""
