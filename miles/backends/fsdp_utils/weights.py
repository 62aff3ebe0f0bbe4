"""Weights between safetensors files of a Hugging Face directory and shards. Each rank reads its own rows only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from miles.backends.fsdp_utils.errors import BadModelDirectory
from miles.backends.fsdp_utils.gather import gathered
from miles.backends.fsdp_utils.lora import with_adapter
from miles.backends.fsdp_utils.shards import base_shards, first_row, is_part_of_adapter, named_shards
from miles.backends.hf_directory import HFDirectory


def load_hf_weights(model: nn.Module, path: Path) -> None:
    """Fill all shards from the files of ``path``, converting dtypes.

    Raises:
        UnreadableModelDirectory: There are no files, or they cannot be read.
        BadModelDirectory: A weight or a shape is not as the configuration says.
    """
    shards = dict(base_shards(model))
    directory = HFDirectory(path)
    missing = sorted(set(shards) - directory.names)
    if missing:
        raise _bad(path, f"{len(missing)} weights are missing", ", ".join(missing[:5]))
    with directory.opened() as opened, torch.no_grad():
        for name, shard in shards.items():
            _fill(shard, opened.tensor(name), path, name)


def full_weights(
    model: nn.Module, dtype: torch.dtype, device: torch.device, *, only_first: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, on all ranks, in the order of the model, with what adapters add to it. Collective: all
    ranks must exhaust it.

    Args:
        device: Where tensors are gathered, also when shards are kept on the host.
        only_first: On the first rank; others yield what they have at hand. With adapters they are put together on all.
    """
    only_first = only_first and not any(is_part_of_adapter(name) for name, _ in named_shards(model))
    for name, tensor in gathered(base_shards(model), device, dtype, only_first=only_first):
        yield name, with_adapter(model, name, tensor)


def _fill(shard: DTensor, whole: torch.Tensor, path: Path, name: str) -> None:
    if whole.shape != shard.shape:
        shapes = f"{tuple(whole.shape)}, not {tuple(shard.shape)}"
        raise _bad(path, f"{name} has another shape than config.json says", shapes)
    local = shard.to_local()
    start = first_row(shard)
    if local.numel():
        local.copy_(whole[start : start + local.shape[0]])


def _bad(path: Path, what: str, evidence: str) -> BadModelDirectory:
    return BadModelDirectory(
        f"{path}: {what}",
        evidence=evidence,
        advice="Give a complete Hugging Face directory; compare it with where it was copied from.",
    )
