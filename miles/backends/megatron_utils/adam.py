"""Adam with the state layout of Transformer Engine's and Apex's FusedAdam, in plain torch.

With ``--optimizer-cpu-offload`` its moments are in host memory and it computes there, parameter by parameter; with
``--overlap-cpu-optimizer-d2h-h2d`` the next parameter is on its way while one is computed.

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
        self.on_host = False
        """Moments and arithmetic are the host's."""
        self.overlaps = False
        """Copies run ahead of the arithmetic."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters with a gradient."""
        assert closure is None, "gradients are ready when this is called"
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params and self.on_host:
                self._update_on_host(group, params)
            elif params:
                self._update(group, params, params, [param.grad for param in params if param.grad is not None])

    def moments(self, param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a parameter, zeros at first; on the host if they belong there (loading a checkpoint moves them)."""
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(param, device="cpu" if self.on_host else None)
            elif self.on_host and state[name].device.type != "cpu":
                state[name] = state[name].cpu()
        return state["exp_avg"], state["exp_avg_sq"]

    def _update_on_host(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        ahead = _fetch(params[0])
        for place, param in enumerate(params):
            host, grad, arrived = ahead
            if self.overlaps and place + 1 < len(params):
                ahead = _fetch(params[place + 1])
            if arrived is not None:
                arrived.synchronize()
            self._update(group, [param], [host], [grad])
            param.copy_(host, non_blocking=self.overlaps)
            if not self.overlaps and place + 1 < len(params):
                ahead = _fetch(params[place + 1])

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        values: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> None:
        """Change ``values``, which are the parameters or copies of them."""
        moments = [self.moments(param) for param in params]
        # The function counts by itself, from a tensor per parameter.
        steps = [torch.tensor(float(group["step"] - 1), device=value.device) for value in values]
        adam(
            values,
            gradients,
            [mean for mean, _ in moments],
            [square for _, square in moments],
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


def _fetch(param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Copies of a parameter and its gradient on the host, and the event after which they are there."""
    assert param.grad is not None
    if param.device.type == "cpu":
        return param.clone(), param.grad.clone(), None
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in (param, param.grad)]
    for copy, tensor in zip(copies, (param, param.grad), strict=True):
        copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return copies[0], copies[1], arrived


def use_in_megatron(*, instead_of_fused: bool) -> None:
    """Make it megatron.core's Adam where neither Transformer Engine nor Apex is installed.

    Args:
        instead_of_fused: Also where one of them is: theirs computes on the device only.
    """
    optimizers: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if not (optimizers.USING_PYTORCH_OPTIMIZER or instead_of_fused):
        return
    optimizers.Adam = distributed.Adam = FusedLayoutAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    # What asks for Apex asks for this state layout.
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
