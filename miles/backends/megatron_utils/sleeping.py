"""What of a Megatron backend leaves memory while it sleeps.

Level 1: gradients, which are dropped, and what the optimizer keeps (moments; float32 parameters beside 16-bit ones).
Level 2: parameters and the reference model, too. Views stay valid: see ``storages``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from miles.backends.megatron_utils.errors import AsleepError
from miles.backends.megatron_utils.storages import Dropped, Kept, Storage, distinct_storages, keep, return_memory


class SleepingMemory:
    """What is put away now, and at which level. ``level`` 0: nothing is."""

    def __init__(self, args: Namespace) -> None:
        self.level = 0
        self._target = getattr(args, "offload_train_target", None) or "cpu"
        directory = getattr(args, "offload_train_disk_dir", None) or getattr(args, "run_dir", None)
        self._directory = Path(directory or ".")
        self._away: list[Dropped | Kept] = []

    def sleep(self, level: int, model: Any, optimizer: Any, reference: Any) -> None:
        """Put away what ``level`` says, unless it is already.

        Raises:
            CannotSleep: What must be kept could not be written; what was awake still is.
        """
        assert level in (1, 2), level
        with torch.no_grad():
            if self.level < 1:
                if optimizer is not None:
                    optimizer.zero_grad()
                    parameters = _parameters(model, reference)
                    self._put_away(_without(distinct_storages(_optimizer_tensors(optimizer)), parameters))
                self._away.append(Dropped(distinct_storages(_gradients(model))))
                self.level = 1
            if self.level < level:
                self._put_away(_parameters(model, reference))
                self.level = 2
        return_memory()

    def _put_away(self, storages: list[Storage]) -> None:
        kept = keep(storages, target=self._target, directory=self._directory)
        if kept is not None:
            self._away.append(kept)

    def wake_up(self) -> None:
        """Everything is as it was before."""
        with torch.no_grad():
            while self._away:
                self._away.pop().restore()
        self.level = 0

    def close(self) -> None:
        """Give files back; what is asleep is lost."""
        for part in self._away:
            part.close()
        self._away.clear()

    def check_awake(self, what: str, *, level: int = 1) -> None:
        """Raises ``AsleepError`` if asleep at ``level`` or deeper."""
        if self.level >= level:
            raise AsleepError(
                f"cannot {what} while asleep at level {self.level}",
                evidence="its memory has been put away by sleep()",
                advice="Call wake_up() first.",
                level=self.level,
            )


def _gradients(model: Any) -> list[torch.Tensor]:
    return [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]


def _parameters(model: Any, reference: Any) -> list[Storage]:
    modules = [model, *([] if reference is None else [reference])]
    return distinct_storages(parameter.data for module in modules for parameter in module.parameters())


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments, and the parameters that it updates: those of the model, or float32 copies of them."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                yield from (value for value in part.optimizer.state[parameter].values() if torch.is_tensor(value))


def _without(storages: list[Storage], others: list[Storage]) -> list[Storage]:
    known = {storage._cdata for storage in others}
    return [storage for storage in storages if storage._cdata not in known]
