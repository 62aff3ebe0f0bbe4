"""Many parameters put together by few collectives: what one of each costs is mostly calls, not bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard

from miles.backends.fsdp_utils.shards import whole
from miles.backends.training_utils.collectives import aligned, bytes_at_once, gathered_rows

Named = tuple[str, DTensor]


def gathered(
    shards: Iterable[Named],
    device: torch.device,
    dtype: torch.dtype,
    *,
    at_once: int | None = None,
    only_first: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, on all ranks, in order; contiguous, in ``dtype`` on ``device``. Collective over the mesh.
    With ``only_first`` on the first of those that shards lie on, and not all on others.

    Args:
        at_once: Bytes to gather at a time, but for a single parameter that is larger; by default what suits the device.
    """
    limit = at_once or bytes_at_once(device)
    waiting: list[_Part] = []
    for name, shard in shards:
        if not _is_plain(shard) or _is_whole_here(shard, device, dtype):
            yield from _gather(waiting, device, dtype, only_first=only_first)
            waiting = []
            yield name, whole(shard, device, dtype) if not _is_plain(shard) else shard.to_local().detach()
            continue
        start = waiting[-1].end if waiting else 0
        part = _Part.of(name, shard, start)
        if waiting and (part.start + part.size) * part.ranks * dtype.itemsize > limit:
            yield from _gather(waiting, device, dtype, only_first=only_first)
            waiting, part = [], _Part.of(name, shard, 0)
        waiting.append(part)
    yield from _gather(waiting, device, dtype, only_first=only_first)


@dataclass(frozen=True)
class _Part:
    """Where a rank's rows of a parameter lie, in numbers, and how many: as many on each rank, the last ones padded."""

    name: str
    shard: DTensor
    start: int
    size: int
    ranks: int

    @classmethod
    def of(cls, name: str, shard: DTensor, start: int) -> _Part:
        ranks = shard.device_mesh.size(shard.device_mesh.ndim - 1)
        rows = -(-shard.shape[0] // ranks)
        return cls(name, shard, start, rows * math.prod(shard.shape[1:]), ranks)

    @property
    def end(self) -> int:
        return aligned(self.start + self.size)


def _is_plain(shard: DTensor) -> bool:
    """Rows over the ranks of the mesh's last dimension, as FSDP2 cuts them; copies over the others."""
    *copies, last = shard.placements
    return last == Shard(0) and not any(isinstance(each, Shard) for each in copies)


def _is_whole_here(shard: DTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Nothing has to be gathered, converted or moved."""
    ranks = shard.device_mesh.size(shard.device_mesh.ndim - 1)
    return ranks == 1 and shard.dtype == dtype and shard.to_local().device == device


@torch.no_grad()
def _gather(
    parts: list[_Part], device: torch.device, dtype: torch.dtype, *, only_first: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    if not parts:
        return
    ranks, total = parts[0].ranks, parts[-1].end
    mine = torch.empty(total, dtype=dtype, device=device)
    rows = [part.shard.to_local().reshape(-1) for part in parts]
    places = [mine[part.start : part.start + len(local)] for part, local in zip(parts, rows, strict=True)]
    torch._foreach_copy_(places, rows)
    table: torch.Tensor | None = mine.view(1, total)
    if ranks > 1:
        mesh = parts[0].shard.device_mesh
        table = gathered_rows(mine, mesh.get_group(mesh.ndim - 1), only_first=only_first)
    if table is None:
        return
    for part in parts:
        shape = part.shard.shape
        columns = table[:, part.start : part.start + part.size]
        yield part.name, columns.reshape(-1, *shape[1:])[: shape[0]].contiguous()
