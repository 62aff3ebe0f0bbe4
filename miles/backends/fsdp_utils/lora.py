"""Low-rank adapters beside the linear layers of a transformers model, sharded with it.

They become parameters of the layers before these are sharded, so that they are gathered, reduced and checkpointed as
all others are. Only they are trained. Layers that share their ``A`` have the same parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from miles.backends.fsdp_utils.shards import base_shards, first_row, whole
from miles.backends.lora.files import Below, Pair, write_adapter
from miles.backends.lora.values import FirstValues, Switch, bit_sum, merged
from miles.utils.lora import LoraSettings


class Adapter(nn.Module):
    """Of one linear layer: ``a`` ``[rank, in]``, ``b`` ``[out, rank]``."""

    def __init__(self, linear: nn.Linear, a: nn.Parameter, settings: LoraSettings, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.dropout, self.scaling = settings.dropout, settings.scaling
        self.a = a
        self.b = nn.Parameter(a.new_empty(linear.out_features, settings.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output."""
        dropped = functional.dropout(x, self.dropout, self.training)
        return functional.linear(functional.linear(dropped, self.a), self.b) * self.scaling


def attach(model: nn.Module, settings: LoraSettings, storage: torch.dtype) -> None:
    """Give each targeted layer an adapter without values, and freeze all else. Before sharding."""
    switch = Switch()
    model.requires_grad_(False)
    shared: dict[str, nn.Parameter] = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and settings.has(name):
            sharer = settings.sharer(name)
            if sharer not in shared:
                shared[sharer] = nn.Parameter(
                    torch.empty(settings.rank, linear.in_features, dtype=storage, device=linear.weight.device)
                )
            linear.adapter = Adapter(linear, shared[sharer], settings, switch)
            linear.register_forward_hook(_add)


def _add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
    return output + module.adapter(inputs[0]) if module.adapter.switch.on else None


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Adapter]]:
    """Those with an adapter, by full name."""
    for name, module in model.named_modules():
        adapter = getattr(module, "adapter", None)
        if isinstance(adapter, Adapter):
            yield name, cast("nn.Linear", module), adapter


class Adapters:
    """Of a sharded model whose own weights are filled. Fills those of the adapters.

    Args:
        base: The path of the weights below.

    Raises:
        BadAdapter: ``--lora-adapter-path`` holds none that fits.
    """

    def __init__(self, model: nn.Module, settings: LoraSettings, base: Path) -> None:
        self.settings, self.base = settings, base
        self._model = model
        self.switch = next(adapter.switch for _, _, adapter in _linears(model))
        self.checksum = weights_checksum(model)
        self.below = Below(base, self.checksum)
        widths = {name: (linear.out_features, linear.in_features) for name, linear, _ in _linears(model)}
        values = FirstValues(settings, widths)
        with torch.no_grad():
            for name, _, adapter in _linears(model):
                for parameter, value in zip((adapter.a, adapter.b), values.pair(name), strict=True):
                    _fill(cast("DTensor", parameter), value)

    def write(self, directory: Path) -> None:
        """In ``peft``'s layout; collective, rank 0 writes.

        Raises:
            OSError: On rank 0.
        """
        kept: dict[str, Pair] = {}
        for name, _, adapter in _linears(self._model):
            pair = pair_of(adapter)
            if dist.get_rank() == 0:
                kept[name] = (pair[0].cpu(), pair[1].cpu())
        if dist.get_rank() == 0:
            write_adapter(directory, kept, self.settings, self.below)


def pair_of(adapter: Adapter) -> Pair:
    """Whole, in the dtype of the shards. Collective."""
    a, b = (whole(cast("DTensor", parameter)) for parameter in (adapter.a, adapter.b))
    return a, b


def with_adapter(model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A whole weight as it is with what its adapter adds, if it has one. Collective."""
    adapter = getattr(model.get_submodule(name.rpartition(".")[0]), "adapter", None)
    if not isinstance(adapter, Adapter) or not name.endswith(".weight"):
        return weight
    return merged(weight, pair_of(adapter), adapter.scaling)


def _fill(shard: DTensor, value: torch.Tensor) -> None:
    local, start = shard.to_local(), first_row(shard)
    if local.numel():
        local.copy_(value[start : start + local.shape[0]])


def weights_checksum(model: nn.Module) -> int:
    """``bit_sum`` of all weights but adapters'. Collective."""
    shards = [shard for _, shard in base_shards(model)]
    total = torch.stack([bit_sum(shard.to_local()) for shard in shards]).sum()
    mesh = shards[0].device_mesh
    if mesh.size(mesh.ndim - 1) > 1:
        dist.all_reduce(total, group=mesh.get_group(mesh.ndim - 1))
    return int(total.item())
