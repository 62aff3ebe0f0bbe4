"""Small agreements between ranks. No object is pickled: what is not a tensor travels as bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_GPU_BYTES, _CPU_BYTES = 256 << 20, 32 << 20
_ALIGNED = 8


def bytes_at_once(device: torch.device) -> int:
    """Bytes to put together by one collective where many small tensors are to be: enough for its call to cost nothing
    beside them, and little beside the model."""
    return _CPU_BYTES if device.type == "cpu" else _GPU_BYTES


def aligned(count: int) -> int:
    """Numbers that ``count`` of a tensor take in a buffer for one collective: the next tensor begins at a multiple of
    what kernels read at once."""
    return -(-count // _ALIGNED) * _ALIGNED


def gathered_rows(mine: torch.Tensor, group: dist.ProcessGroup, *, only_first: bool = False) -> torch.Tensor | None:
    """``[size, n]``: each rank's numbers ``[n]``, by rank. Collective over the group.

    With ``only_first`` its first rank has them, and others get None: what that one would send to the others would take
    from what it sends to engines meanwhile.
    """
    if only_first and group.rank() != 0:
        dist.gather(mine, group=group, group_dst=0)
        return None
    rows = mine.new_empty(group.size(), len(mine))
    if only_first:
        dist.gather(mine, list(rows), group=group, group_dst=0)
    else:
        dist.all_gather_into_tensor(rows.view(-1), mine, group=group)
    return rows


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """In place; nothing to do for None (a group of one)."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


class _SharedPlaces(torch.autograd.Function):
    """Values that ranks of a group have for some places each, put together: every rank has all of them.

    Each rank goes on to compute the same from the whole, so the gradient of a rank's own values is that of its own
    result, not the sum over ranks: summing is done where gradients of parameters are.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, count: int, group: Any) -> torch.Tensor:
        ctx.save_for_backward(places)
        whole = values.new_zeros(count)
        whole[places] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return gradient[places], None, None, None


def share_places(
    values: torch.Tensor, places: torch.Tensor, count: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """``[count]`` with every rank's ``values`` at its ``places``, which together are all places once. With gradient:
    see ``_SharedPlaces``. Collective over ``group``."""
    shared: torch.Tensor = _SharedPlaces.apply(values, places, count, group)  # type: ignore[no-untyped-call]
    return shared


def all_gather_text(text: str, device: torch.device) -> list[str]:
    """Every rank's text, by rank. Collective over all ranks."""
    data = text.encode()
    world = dist.get_world_size()
    lengths = torch.zeros(world, dtype=torch.int64, device=device)
    lengths[dist.get_rank()] = len(data)
    dist.all_reduce(lengths)
    longest = int(lengths.max())
    if longest == 0:
        return [""] * world
    row = torch.zeros(longest, dtype=torch.uint8)
    row[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(rows, row.to(device))
    return [
        bytes(gathered[: int(length)].tolist()).decode(errors="replace")
        for gathered, length in zip(rows, lengths, strict=True)
    ]


def sum_by_name(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over all ranks of what each has under a name; a rank need not have all names. Collective over all ranks."""
    names = sorted({name for text in all_gather_text("\n".join(values), device) for name in text.split("\n") if name})
    if not names:
        return {}
    sums = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))
