"""Small agreements between ranks. No object is pickled: what is not a tensor travels as bytes."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """In place; nothing to do for None (a group of one)."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


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
