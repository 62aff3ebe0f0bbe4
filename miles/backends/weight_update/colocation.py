"""Trainer ranks and engines that share GPUs: who shares with whom, and what all ranks tell each other. Needs torch."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from miles.backends.base import ParallelState
from miles.backends.weight_update.failures import BadUpdate
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate

T = TypeVar("T")
_gloo: list[dist.ProcessGroup] = []
"""A group of all trainer ranks for what is not on a GPU; made once."""


def engine_of(parallel: ParallelState, update: WeightUpdate) -> EngineTarget | None:
    """The engine that this rank shares a GPU with. Raises BadUpdate if an engine is on GPUs without a trainer rank."""
    for engine in update.engines:
        first = engine.rank_offset - 1
        if first + engine.tp_size > parallel.world_size:
            raise BadUpdate(
                f"{engine.name} is not on the trainer's GPUs, so CUDA IPC cannot reach it",
                evidence=f"its GPUs begin at {first}, {engine.tp_size} of them; trainer ranks: {parallel.world_size}",
                advice="Colocate as many engine GPUs as trainer ranks, or leave out --colocate.",
            )
    fits = (e for e in update.engines if e.rank_offset - 1 <= parallel.rank < e.rank_offset - 1 + e.tp_size)
    return next(fits, None)


def gathered(parallel: ParallelState, value: T) -> list[T]:
    """From all trainer ranks, by rank. Collective."""
    if parallel.world_size == 1:
        return [value]
    if not _gloo:
        _gloo.append(dist.new_group(backend="gloo"))
    values: list[T] = [value] * parallel.world_size
    dist.all_gather_object(values, value, group=_gloo[0])
    return values
