"""Parameters of a sharded model: by name, whole, and which are adapters' (``lora``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def named_shards(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """Parameters by name, a tied one once."""
    for name, parameter in model.named_parameters():
        yield name, cast("DTensor", parameter)


def base_shards(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """Those that a Hugging Face directory holds: all but adapters'."""
    return ((name, shard) for name, shard in named_shards(model) if not is_part_of_adapter(name))


def saved_shards(model: nn.Module) -> dict[str, DTensor]:
    """What a checkpoint holds of a model: its adapters alone, if it has some."""
    adapters = {name: shard for name, shard in named_shards(model) if is_part_of_adapter(name)}
    return adapters or dict(named_shards(model))


def is_part_of_adapter(name: str) -> bool:
    """Of a parameter's name."""
    return ".adapter." in name


def whole(shard: DTensor, device: torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All of it, on every rank. Collective.

    Args:
        device: Where it is gathered, also when shards are kept on the host; by default that of collectives.
        dtype: To convert to, before gathering.
    """
    mesh = shard.device_mesh
    if device is None:
        on_gpu = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    with torch.no_grad():
        local = shard.to_local().to(device, dtype or shard.dtype)
        part = DTensor.from_local(
            local, mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )
        return part.full_tensor()


def first_row(shard: DTensor) -> int:
    """Where this rank's rows begin in the whole: FSDP2 cuts dimension 0 into equal parts, the last ones shorter. Ranks
    of the mesh's last dimension have different ones."""
    mesh = shard.device_mesh
    last = mesh.ndim - 1
    rows = -(-shard.shape[0] // mesh.size(last))
    return min(rows * mesh.get_local_rank(last), shard.shape[0])
