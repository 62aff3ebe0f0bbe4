"""The optimizer over this rank's shards: gradient norm, clipping, one step, and a schedule that counts steps.

The update is the same for each number, so that each rank does its own rows, as plain tensors that share memory with
the model's shards. Biases and norms are not decayed, as in Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from miles.backends.fsdp_utils.schedule import Schedule
from miles.backends.fsdp_utils.settings import OptimizerSettings
from miles.backends.fsdp_utils.shards import named_shards

STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Shard:
    """A parameter's rows on this rank: ``local`` shares memory with ``parameter``."""

    name: str
    parameter: DTensor
    local: nn.Parameter


class ShardedOptimizer:
    """AdamW or SGD with the schedule's rates. ``steps``: those done so far."""

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, schedule: Schedule, group: dist.ProcessGroup
    ) -> None:
        self.settings = settings
        self.schedule = schedule
        self.steps = 0
        trained = [(name, p) for name, p in named_shards(model) if p.requires_grad]
        self.shards = [Shard(name, p, nn.Parameter(p.to_local().detach())) for name, p in trained]
        self._group = group
        self._optimizer = self._made()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.schedule.learning_rate(self.steps)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Of ``local`` of each shard. Rates and decay of its groups are set anew at each step."""
        return self._optimizer

    def take_gradients(self) -> float:
        """Take the model's gradients over. Returns their global norm."""
        for shard in self.shards:
            gradient = shard.parameter.grad
            shard.local.grad = None if gradient is None else _local(gradient)
            shard.parameter.grad = None
        gradients = [shard.local.grad for shard in self.shards if shard.local.grad is not None]
        device = self.shards[0].local.device
        total = torch.zeros((), dtype=torch.float32, device=device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
            total = torch.stack(norms).square().sum()
        dist.all_reduce(total, group=self._group)
        return float(total.sqrt())

    def step(self, norm: float) -> None:
        """Clip by the global norm and update; the gradients are gone then."""
        clip = self.settings.clip_grad
        gradients = [shard.local.grad for shard in self.shards if shard.local.grad is not None]
        scale = clip / (norm + 1e-6) if clip > 0 else 1.0
        if gradients and scale < 1.0:
            torch._foreach_mul_(gradients, scale)
        for index, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self.learning_rate
            group["weight_decay"] = self.schedule.weight_decay(self.steps) if index == 0 else 0.0
        self._optimizer.step()
        self.drop_gradients()
        self.steps += 1

    def drop_gradients(self) -> None:
        """Leave a step out."""
        for shard in self.shards:
            shard.local.grad = None
            shard.parameter.grad = None

    def state(self, shard: Shard) -> dict[str, torch.Tensor]:
        """A parameter's state on this rank, by the names of ``STATES``; zeros before the first step."""
        kept = self._optimizer.state[shard.local]
        for name in STATES[self.settings.name]:
            if kept.get(name) is None:
                kept[name] = torch.zeros_like(shard.local, requires_grad=False)
        if self.settings.name == "adam" and "step" not in kept:
            kept["step"] = torch.tensor(float(self.steps), device=shard.local.device)
        return {name: kept[name] for name in STATES[self.settings.name]}

    def set_steps(self, steps: int) -> None:
        """Go on after ``steps`` steps, with states that have been filled."""
        self.steps = steps
        for shard in self.shards:
            self.state(shard)
            if self.settings.name == "adam":
                self._optimizer.state[shard.local]["step"].fill_(float(steps))

    def reset(self) -> None:
        """States are zero and no step has been counted in them; the schedule's count stays."""
        for state in self._optimizer.state.values():
            for name in ("step", *STATES[self.settings.name]):
                if state.get(name) is not None:
                    state[name].zero_()

    def tensors(self) -> list[torch.Tensor]:
        """What takes memory: the states that there are."""
        states = (self._optimizer.state.get(shard.local, {}) for shard in self.shards)
        names = STATES[self.settings.name]
        return [state[name] for state in states for name in names if state.get(name) is not None]

    def _made(self) -> torch.optim.Optimizer:
        decayed = [shard.local for shard in self.shards if shard.parameter.dim() > 1]
        others = [shard.local for shard in self.shards if shard.parameter.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        rate, decay = self.learning_rate, self.schedule.weight_decay(0)
        if self.settings.name == "sgd":
            momentum = self.settings.momentum
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, weight_decay=decay, foreach=True)
        return torch.optim.AdamW(
            groups, lr=rate, betas=self.settings.betas, eps=self.settings.eps, weight_decay=decay, fused=True
        )


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
