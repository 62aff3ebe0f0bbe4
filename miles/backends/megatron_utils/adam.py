"""Adam with the state layout of Transformer Engine's and Apex's FusedAdam, in plain torch.

megatron.core's distributed optimizer saves and loads that layout: ``step`` in the parameter group, ``exp_avg`` and
``exp_avg_sq`` per parameter. With torch's own Adam, which keeps a step per parameter, a resumed run is another run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam (https://arxiv.org/abs/1412.6980), by default with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters with a gradient."""
        assert closure is None, "gradients are ready when this is called"
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        # The function counts by itself, from a tensor per parameter.
        steps = [torch.tensor(float(group["step"] - 1), device=param.device) for param in params]
        adam(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )


def use_in_megatron() -> None:
    """Make it megatron.core's Adam where neither Transformer Engine nor Apex is installed."""
    optimizers: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if not optimizers.USING_PYTORCH_OPTIMIZER:
        return
    optimizers.Adam = distributed.Adam = FusedLayoutAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    # What asks for Apex asks for this state layout.
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
