"""What of a Megatron backend leaves memory while it sleeps.

Level 1: gradients, which are dropped, and what the optimizer keeps (moments; float32 parameters beside 16-bit ones).
Level 2: parameters and frozen models, too. Views stay valid: see ``training_utils.storages``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from miles.backends.training_utils.sleeping import SleepingMemory, without
from miles.backends.training_utils.storages import Storage, distinct_storages


def fall_asleep(memory: SleepingMemory, level: int, model: Any, optimizer: Any, frozen: Iterable[Any]) -> None:
    """Put away what ``level`` says, unless it is already. ``optimizer`` None: there is none.

    Raises:
        CannotSleep: What must be kept could not be written; what was awake still is.
    """
    assert level in (1, 2), level
    models = [model, *frozen]
    with torch.no_grad():
        if memory.level < 1:
            if optimizer is not None:
                optimizer.zero_grad()
                memory.put_away(without(distinct_storages(_optimizer_tensors(optimizer)), _parameters(models)))
            memory.drop(distinct_storages(_gradients(model)))
            memory.level = 1
        if memory.level < level:
            memory.put_away(_parameters(models))
            memory.level = 2
    memory.give_back()


def _gradients(model: Any) -> list[torch.Tensor]:
    return [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]


def _parameters(modules: Iterable[Any]) -> list[Storage]:
    return distinct_storages(parameter.data for module in modules for parameter in module.parameters())


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments, and the parameters that it updates: those of the model, or float32 copies of them."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                yield from (value for value in part.optimizer.state[parameter].values() if torch.is_tensor(value))
