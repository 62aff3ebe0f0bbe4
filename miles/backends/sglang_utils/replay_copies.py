"""Does the copies of a plan again, from another bucket of the same layout: small ones in few launches. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from miles.backends.sglang_utils.copy_plan import (
    WIDTHS,
    Copy,
    CopyPlan,
    Extent,
    Fill,
    Pieces,
    Region,
    Step,
    arrange,
    in_place,
)
from miles.backends.sglang_utils.model_memory import in_storage
from miles.backends.weight_update.bucket_copies import COPIED_ALONE_BYTES
from miles.backends.weight_update.buckets import Entry


class Replay:
    """A plan with the model's side at hand. The bucket's side is cut out of each bucket anew, in few calls."""

    def __init__(self, plan: CopyPlan, storages: dict[int, torch.UntypedStorage]) -> None:
        self._stop = plan.source_stop
        with torch.inference_mode(False):
            self._flat = [_Flat(pieces, storages) for pieces in plan.flat]
            self._loose = [
                ([_target(copy.target, storages) for copy in copies], [copy.source for copy in copies])
                for copies in _by_dtypes(plan.loose)
            ]
            self._ordered = [
                (_target(step.target, storages), step.value if isinstance(step, Fill) else step.source)
                for step in plan.ordered
            ]

    @torch.no_grad()
    def run(self, memory: torch.Tensor, *, beside_broadcast: bool = False) -> None:
        """Do all of it from this bucket, in the current stream; beside a broadcast not as fast as it goes."""
        if memory.numel() < self._stop:
            raise ValueError(f"a bucket of {memory.numel()} bytes, where {self._stop} are read")
        bucket = _Bucket(memory)
        for flat in self._flat:
            flat.run(bucket, beside_broadcast=beside_broadcast)
        for targets, sources in self._loose:
            torch._foreach_copy_(targets, [bucket.view(source) for source in sources])
        for target, source in self._ordered:
            if isinstance(source, Region):
                target.copy_(bucket.view(source))
            else:
                target.fill_(source)


class InPlace:
    """What of buckets of one layout is received where the model keeps it, and the copies that are left to do.

    Attributes:
        spans: Parts of the bucket that arrive by themselves.
        places: By index of the span: uint8 ``[n]``, the model's own memory.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        spans: Sequence[tuple[int, int]],
        also_written: Sequence[Extent],
        storages: dict[int, torch.UntypedStorage],
    ) -> None:
        self.spans = spans
        pieces, rest = in_place(steps, spans, also_written)
        with torch.inference_mode(False):
            self.places = {
                index: _target(Region(p.memory, torch.uint8, p.target, (p.num_bytes,), (1,)), storages)
                for index, p in pieces.items()
            }
        self._rest = Replay(arrange(rest if pieces else ()), storages)

    def load_rest(self, memory: torch.Tensor, *, beside_broadcast: bool = False) -> None:
        """As ``Replay.run``, for what is not in its place yet."""
        self._rest.run(memory, beside_broadcast=beside_broadcast)


def _by_dtypes(copies: Iterable[Copy]) -> list[list[Copy]]:
    """Alike in the dtypes of both sides: of targets that differ, earlier torch takes all for what the first one is."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[Copy]] = {}
    for copy in copies:
        groups.setdefault((copy.target.dtype, copy.source.dtype), []).append(copy)
    return list(groups.values())


class _Flat:
    """``Pieces`` with their targets, all integers of one width: small ones by ``_foreach_copy_``, in few launches."""

    def __init__(self, pieces: Pieces, storages: dict[int, torch.UntypedStorage]) -> None:
        width = pieces.width
        self._dtype = WIDTHS[width]
        self._start = pieces.start // width
        self._sizes, self._picks = pieces.sizes()
        self._total = sum(self._sizes)
        self._targets = [
            _target(Region(p.memory, self._dtype, p.target, (p.num_bytes // width,), (1,)), storages)
            for p in pieces.pieces
        ]
        self._all = list(range(len(self._targets)))
        self._large = [index for index in self._all if pieces.pieces[index].num_bytes >= COPIED_ALONE_BYTES]
        self._small = [index for index in self._all if index not in set(self._large)]

    def run(self, bucket: _Bucket, *, beside_broadcast: bool) -> None:
        part = bucket.typed(self._dtype, (self._total,), (1,), self._start)
        cut = part.split_with_sizes(self._sizes)
        alone, together = ([], self._all) if beside_broadcast else (self._large, self._small)
        for index in alone:
            self._targets[index].copy_(cut[self._picks[index]])
        if together:
            picked = [cut[self._picks[index]] for index in together]
            torch._foreach_copy_([self._targets[index] for index in together], picked)


class _Bucket:
    """A bucket's memory, seen in several dtypes."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._offset = int(memory.storage_offset())
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def typed(self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> torch.Tensor:
        """``start`` in elements of the dtype from the bucket's begin."""
        memory = self._memory
        whole = self._typed.get(dtype)
        if whole is None:
            storage = memory.untyped_storage()
            whole = in_storage(storage, dtype, 0, (storage.nbytes() // dtype.itemsize,), (1,))
            self._typed[dtype] = whole
        return whole.as_strided(shape, strides, self._offset // dtype.itemsize + start)

    def view(self, region: Region) -> torch.Tensor:
        return self.typed(region.dtype, region.shape, region.strides, region.start // region.dtype.itemsize)


def views(entries: Sequence[Entry], memory: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket in place, as ``load_weights`` takes them. Raises as ``LoadPlans.load`` does."""
    bucket, offset = _Bucket(memory), int(memory.storage_offset())
    named = []
    for entry in entries:
        strides = _row_by_row(entry.shape) if entry.strides is None else entry.strides
        region = Region(0, entry.dtype, entry.start, tuple(entry.shape), strides)
        if (offset + entry.start) % entry.dtype.itemsize or offset % entry.dtype.itemsize:
            raise ValueError(f"{entry.name} begins at byte {offset} + {entry.start}: no place for a {entry.dtype}")
        if not 0 <= entry.start <= region.stop <= memory.numel():
            raise ValueError(f"{entry.name} ends at byte {region.stop} of a bucket of {memory.numel()}")
        named.append((entry.name, bucket.view(region)))
    return named


def _row_by_row(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _target(region: Region, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    start = region.start // region.dtype.itemsize
    return in_storage(storages[region.memory], region.dtype, start, region.shape, region.strides)
