"""Many tensors moved between ranks by one collective: what one of each costs is mostly calls, not bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from miles.backends.training_utils.collectives import aligned, gathered_rows


def all_shards(
    shards: Sequence[torch.Tensor], group: dist.ProcessGroup | None, *, only_first: bool = False
) -> list[list[torch.Tensor]]:
    """Of each parameter, everybody's shards by rank; with ``only_first`` on the group's first rank, and nothing on
    others. Collective over the group, once for each dtype.

    What comes from one collective lies in one piece of memory, all of which is kept as long as any of it is.
    """
    if group is None or group.size() == 1:
        return [[shard] for shard in shards]
    found: list[list[torch.Tensor]] = [[] for _ in shards]
    for dtype in dict.fromkeys(shard.dtype for shard in shards):
        places = [place for place, shard in enumerate(shards) if shard.dtype == dtype]
        own = [shards[place] for place in places]
        mine = _packed(own)
        everybodys = gathered_rows(mine, group, only_first=only_first)
        if everybodys is None:
            continue
        by_rank = [_unpacked(row, own) for row in everybodys]
        for place, parts in zip(places, zip(*by_rank, strict=True), strict=True):
            found[place] = list(parts)
    return found


def from_owner(tensors: list[torch.Tensor], owner: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The tensors of the group's rank ``owner``, all of one dtype. Collective over the group.

    Other ranks' ``tensors`` only say what is to come: dtype, device and shapes. What comes lies in one piece of memory,
    all of which is kept as long as any of it is.
    """
    if group is None or group.size() == 1 or not tensors:
        return tensors
    if group.rank() == owner:
        dist.broadcast(_packed(tensors), group_src=owner, group=group)
        return tensors
    flat = tensors[0].new_empty(_starts(tensors)[-1])
    dist.broadcast(flat, group_src=owner, group=group)
    return _unpacked(flat, tensors)


def _starts(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each begins, in numbers, and where the last ends."""
    if len(tensors) == 1:
        return [0, tensors[0].numel()]
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + aligned(tensor.numel()))
    return starts


@torch.no_grad()
def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them, one after the other. A single one is not copied if it lies in one piece: it may be a large one."""
    first = tensors[0]
    assert all(tensor.dtype == first.dtype for tensor in tensors), "tensors of several dtypes"
    if len(tensors) == 1:
        return first.reshape(-1)
    flat = first.new_empty(_starts(tensors)[-1])
    torch._foreach_copy_(_unpacked(flat, tensors), list(tensors))
    return flat


def _unpacked(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of what ``_packed`` made of tensors with the shapes of ``like``."""
    places = zip(_starts(like), like, strict=False)  # the last of them is the end
    return [flat[start : start + each.numel()].view(each.shape) for start, each in places]
