"""What loading a bucket copies, and in which order it may be done again in few launches. Pure; torch for dtypes only.

A step is a copy from the bucket's memory to the model's, or a number that is written there. Steps whose targets do not
touch each other may be done in any order, and are: flat ones of all tensors become pieces that ``_foreach_copy_`` takes
at once, whatever their dtype is (``Pieces``: bytes in the widest integers that fit, joined where both sides are
neighbours). Steps whose targets may overlap keep their order, one after the other.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch

WIDTHS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class Region:
    """Elements in a memory: ``start`` in bytes from its begin, ``strides`` in elements, none of them negative.

    ``memory`` is the address of a storage of the model, or 0: the bucket's.
    """

    memory: int
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """First byte after its last element. Of an empty one: ``start``."""
        if not self.numel:
            return self.start
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Row by row, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Copy:
    """``target`` and ``source`` have the same shape."""

    target: Region
    source: Region

    @property
    def is_flat(self) -> bool:
        """The bytes of one are those of the other, in one piece each."""
        target, source = self.target, self.source
        return target.dtype == source.dtype and target.is_contiguous and source.is_contiguous


@dataclass(frozen=True, slots=True)
class Fill:
    """One number for all elements."""

    target: Region
    value: bool | int | float


Step = Copy | Fill


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that lie in one piece on both sides."""

    memory: int
    target: int
    source: int
    num_bytes: int

    def joins(self, after: Piece) -> bool:
        """Whether ``after`` begins where it ends, on both sides."""
        ends = (self.memory, self.target + self.num_bytes, self.source + self.num_bytes)
        return ends == (after.memory, after.target, after.source)

    @property
    def width(self) -> int:
        """Of the widest integers that it can be seen as."""
        return next(w for w in WIDTHS if not (self.target % w or self.source % w or self.num_bytes % w))


@dataclass(frozen=True, slots=True)
class Pieces:
    """In the order of their sources, which do not overlap, seen as integers of ``width`` bytes."""

    width: int
    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        """Of the first source, in bytes."""
        return self.pieces[0].source

    def sizes(self) -> tuple[list[int], list[int]]:
        """The sources and the gaps between them, in integers of ``width``, from ``start`` on; which are sources."""
        sizes, picks, at = [], [], self.start
        for piece in self.pieces:
            if piece.source > at:
                sizes.append((piece.source - at) // self.width)
            picks.append(len(sizes))
            sizes.append(piece.num_bytes // self.width)
            at = piece.source + piece.num_bytes
        return sizes, picks


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What is done in any order (``flat``, ``loose``), and what in the order given."""

    flat: tuple[Pieces, ...]
    loose: tuple[Copy, ...]
    ordered: tuple[Step, ...]
    source_stop: int
    """As many bytes of the bucket are needed."""


def arrange(steps: Iterable[Step]) -> CopyPlan:
    """The same effect as doing ``steps`` one after the other, whatever the bucket holds."""
    steps = _last_of_each(steps)
    loose: list[Copy] = []
    flat: list[Piece] = []
    ordered: list[Step] = []
    for cluster in _clusters(steps):
        only = cluster[0]
        if len(cluster) > 1 or isinstance(only, Fill):
            ordered += cluster
        elif only.is_flat:
            num_bytes = only.target.stop - only.target.start
            flat.append(Piece(only.target.memory, only.target.start, only.source.start, num_bytes))
        else:
            loose.append(only)
    stops = [step.source.stop for step in steps if isinstance(step, Copy)]
    return CopyPlan(tuple(_packed(_joined(flat))), tuple(loose), tuple(ordered), max(stops, default=0))


Extent = tuple[int, int, int]
"""Of a memory: its address, first byte, and first byte after it."""


def contested(plans: Iterable[Iterable[Step]]) -> list[Extent]:
    """What more than one of these plans writes to."""
    extents = sorted(
        (step.target.memory, step.target.start, step.target.stop, plan)
        for plan, steps in enumerate(plans)
        for step in steps
        if step.target.numel
    )
    found: list[Extent] = []
    memory = last = -1
    until = 0  # where the one ends that goes furthest, which is ``last``'s
    for its, start, stop, plan in extents:
        if its != memory:
            memory, until = its, start
        if start < until and plan != last:
            found.append((its, start, min(stop, until)))
        if stop > until:
            until, last = stop, plan
    return found


def in_place(
    steps: Iterable[Step], spans: Sequence[tuple[int, int]], also_written: Sequence[Extent] = ()
) -> tuple[dict[int, Piece], list[Step]]:
    """What of the bucket may as well arrive where the model keeps it, before earlier buckets have been copied.

    Args:
        also_written: By other buckets: that keeps its order.
        spans: Parts of the bucket, as first byte and number of bytes, in their order, none of them overlapping another.

    Returns:
        By index of the span, the piece of each that a copy takes as a whole, and in one piece, to where nothing else
        writes, and that nothing else reads. Of such a copy's spans all are there. And the steps that are left to do.
    """
    steps = _last_of_each(steps)
    taken: dict[Copy, list[int]] = {}
    readers: dict[int, int] = {}
    for cluster in _clusters(steps):
        for step in cluster:
            if isinstance(step, Fill) or not step.source.numel:
                continue
            touched = _touched(spans, step.source)
            readers.update((index, readers.get(index, 0) + 1) for index in touched)
            is_alone = len(cluster) == 1 and not _meets(step.target, also_written)
            if is_alone and step.is_flat and _make_up([spans[index] for index in touched], step.source):
                taken[step] = touched
    taken = {step: touched for step, touched in taken.items() if all(readers[index] == 1 for index in touched)}
    pieces = {}
    for step, touched in taken.items():
        target, source = step.target, step.source
        for index in touched:
            start, num_bytes = spans[index]
            pieces[index] = Piece(target.memory, target.start + start - source.start, start, num_bytes)
    return pieces, [step for step in steps if step not in taken]


def _meets(target: Region, extents: Sequence[Extent]) -> bool:
    return any(m == target.memory and start < target.stop and target.start < stop for m, start, stop in extents)


def _make_up(spans: Sequence[tuple[int, int]], source: Region) -> bool:
    """Whether they are all of it, and nothing else."""
    if not spans or spans[0][0] != source.start or sum(spans[-1]) != source.stop:
        return False
    return all(sum(before) == start for before, (start, _) in pairwise(spans))


def _touched(spans: Sequence[tuple[int, int]], source: Region) -> list[int]:
    """Indices of the spans that it reads from."""
    at, found = max(bisect_right(spans, source.start, key=lambda span: span[0]) - 1, 0), []
    while at < len(spans) and spans[at][0] < source.stop:
        if sum(spans[at]) > source.start:
            found.append(at)
        at += 1
    return found


def _last_of_each(steps: Iterable[Step]) -> list[Step]:
    """Without steps that are done again later: what they write is written over by the same (tied embeddings)."""
    return list(dict.fromkeys(reversed(list(steps))))[::-1]


def _clusters(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps whose targets' extents overlap, directly or through others, together and in their order."""
    places = sorted(range(len(steps)), key=lambda index: (steps[index].target.memory, steps[index].target.start))
    cluster: list[int] = []
    memory, stop = 0, 0
    for index in places:
        target = steps[index].target
        if cluster and (target.memory != memory or target.start >= stop):
            yield [steps[member] for member in sorted(cluster)]
            cluster = []
        stop = max(stop, target.stop) if cluster else target.stop
        memory = target.memory
        cluster.append(index)
    if cluster:
        yield [steps[member] for member in sorted(cluster)]


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.memory, piece.target)):
        if joined and joined[-1].joins(piece):
            joined[-1] = replace(joined[-1], num_bytes=joined[-1].num_bytes + piece.num_bytes)
        else:
            joined.append(piece)
    return joined


def _packed(pieces: Iterable[Piece]) -> Iterator[Pieces]:
    """By width; what reads the same bytes twice goes to another group, as groups are cut out of the bucket."""
    ordered = sorted(pieces, key=lambda piece: (piece.width, piece.source))
    for width, members in groupby(ordered, key=lambda piece: piece.width):
        groups: list[list[Piece]] = []
        for piece in members:
            fits = (g for g in groups if g[-1].source + g[-1].num_bytes <= piece.source)
            group = next(fits, None)
            if group is None:
                groups.append(group := [])
            group.append(piece)
        for group in groups:
            yield Pieces(width, tuple(group))
