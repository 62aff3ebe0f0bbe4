"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, from the flags."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from miles.backends.megatron_utils.adam import FusedLayoutAdam, use_in_megatron
from miles.backends.megatron_utils.errors import UnsupportedSetting
from miles.backends.megatron_utils.flag_fields import DATA_PARALLEL, OPTIMIZER, fields

_REFUSED = {
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "fp16": "--fp16",
}


def has_optimizer(args: Namespace) -> bool:
    """Not with ``--debug-disable-optimizer``."""
    return not getattr(args, "debug_disable_optimizer", False)


def wrap_data_parallel(args: Namespace, model: GPTModel) -> DistributedDataParallel:
    """The model with its gradient buffers (and, for Adam, parameter buffers), reduced over data-parallel ranks."""
    bf16 = model.config.params_dtype == torch.bfloat16
    config = DistributedDataParallelConfig(
        **fields(args, DATA_PARALLEL),
        # In 16 bits, sums over micro-batches and ranks lose what they are for.
        grad_reduce_in_fp32=bf16 and not getattr(args, "grad_reduce_in_bf16", False),
        use_distributed_optimizer=args.optimizer == "adam" and has_optimizer(args),
    )
    if buckets := getattr(args, "ddp_num_buckets", None):
        config.bucket_size = math.ceil(sum(p.numel() for p in model.parameters() if p.requires_grad) / buckets)
    return DistributedDataParallel(config=model.config, ddp_config=config, module=model)


def build_optimizer(args: Namespace, model: DistributedDataParallel) -> Any:
    """Adam, sharded over data-parallel ranks, or SGD.

    Raises:
        UnsupportedSetting: A flag asks for what is not built, or what this device lacks.
    """
    for name, flag in _REFUSED.items():
        if getattr(args, name, False):
            raise UnsupportedSetting(
                f"{flag} is not built yet",
                evidence="the Megatron backend keeps fp32 state of Adam or SGD where the parameters are",
                advice=f"Leave {flag} out.",
            )
    if args.optimizer not in ("adam", "sgd"):
        raise UnsupportedSetting(
            f"--optimizer {args.optimizer} is not known", evidence="known: adam, sgd", advice="Choose one of them."
        )
    on_host = bool(getattr(args, "optimizer_cpu_offload", False))
    use_in_megatron(instead_of_fused=on_host)
    dtype = model.config.params_dtype
    config = OptimizerConfig(
        **fields(args, OPTIMIZER),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
    )
    overrides = get_standard_config_overrides(config)
    optimizer = get_megatron_optimizer(config, [model], config_overrides=overrides, use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if on_host:
            _compute_on_host(args, part)
        part.init_state_fn = part.init_state_fn or _init_sgd
        # Not with the first step: a checkpoint holds the same before it, and sleeping has something to put away.
        part.init_state_fn(part.optimizer, config)
    return optimizer


def _compute_on_host(args: Namespace, part: Any) -> None:
    """``--optimizer-cpu-offload``: Adam's moments and arithmetic go to the host."""
    if not isinstance(part.optimizer, FusedLayoutAdam):
        raise UnsupportedSetting(
            f"--optimizer-cpu-offload does not go with {type(part.optimizer).__name__}",
            evidence=f"--optimizer {args.optimizer}; what goes to the host is Adam",
            advice="Use --optimizer adam, or leave it out.",
        )
    part.optimizer.on_host = True
    part.optimizer.overlaps = bool(getattr(args, "overlap_cpu_optimizer_d2h_h2d", False))

    def init_state(optimizer: FusedLayoutAdam, _config: OptimizerConfig | None = None) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.moments(parameter)

    part.init_state_fn = init_state


def _init_sgd(optimizer: torch.optim.Optimizer, _config: OptimizerConfig) -> None:
    """Momentum of zeros is what SGD begins with."""
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def reset_optimizer(optimizer: Any) -> None:
    """Moments are zero and no step has been counted, as before the first one."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0
        for state in part.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if state.get(name) is not None:
                    state[name].zero_()


def build_scheduler(args: Namespace, optimizer: Any) -> OptimizerParamScheduler:
    """Counts optimizer steps. Warm-up and decay that the flags do not bound end with the run."""
    total = train_steps(args)
    decay = getattr(args, "lr_decay_iters", None) or total
    fraction = getattr(args, "lr_warmup_fraction", None)
    warmup = fraction * decay if fraction is not None else getattr(args, "lr_warmup_iters", None) or 0
    weight_decay = args.weight_decay
    start, end = (getattr(args, f"{which}_weight_decay", None) for which in ("start", "end"))
    use_checkpoint = bool(getattr(args, "use_checkpoint_opt_param_scheduler", False))
    _check_schedule(args, weight_decay if start is None else start, weight_decay if end is None else end)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=getattr(args, "lr_warmup_init", None) or 0.0,
        max_lr=args.lr,
        min_lr=getattr(args, "min_lr", None) or 0.0,
        lr_warmup_steps=warmup,
        # It contains the warm-up, and must be longer; beyond its end the rate is the lowest anyway.
        lr_decay_steps=max(decay, math.ceil(warmup) + 1),
        lr_decay_style=args.lr_decay_style,
        start_wd=weight_decay if start is None else start,
        end_wd=weight_decay if end is None else end,
        wd_incr_steps=total,
        wd_incr_style=getattr(args, "weight_decay_incr_style", None) or "constant",
        # A run may be continued for longer than it was meant at first: flags win unless told otherwise.
        use_checkpoint_opt_param_scheduler=use_checkpoint,
        override_opt_param_scheduler=not use_checkpoint,
        wsd_decay_steps=getattr(args, "lr_wsd_decay_iters", None),
        lr_wsd_decay_style=getattr(args, "lr_wsd_decay_style", None),
    )


def _check_schedule(args: Namespace, start_decay: float, end_decay: float) -> None:
    """What megatron.core asserts."""
    lowest, first = getattr(args, "min_lr", None) or 0.0, getattr(args, "lr_warmup_init", None) or 0.0
    varying = (getattr(args, "weight_decay_incr_style", None) or "constant") != "constant"
    if not 0 <= lowest <= args.lr or first > args.lr:
        what = f"--min-lr {lowest} and --lr-warmup-init {first} must be between 0 and --lr {args.lr}"
    elif not 0 <= start_decay <= end_decay or (start_decay != end_decay and not varying):
        what = f"weight decay cannot go from {start_decay} to {end_decay}"
    else:
        return
    raise UnsupportedSetting(
        what,
        evidence=f"--lr-decay-style {args.lr_decay_style}",
        advice="Let the rate fall to --min-lr; let weight decay grow, with --weight-decay-incr-style linear or cosine.",
    )


def train_steps(args: Namespace) -> int:
    """Optimizer steps of the whole run; at least 1."""
    rollouts = getattr(args, "num_rollout", None) or 1
    return max(int(rollouts * (getattr(args, "num_steps_per_rollout", None) or 1)), 1)


def gradient_norm(model: DistributedDataParallel) -> float:
    """Global norm of what is in the buffers, where there is no optimizer to ask (``--debug-disable-optimizer``)."""
    gradients = [
        parameter.main_grad
        for parameter in model.parameters()
        if parameter.requires_grad
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    group = parallel_state.get_model_parallel_group()
    return float(get_grad_norm_fp32(gradients, grad_stats_parallel_group=group))


def clip_gradients(optimizer: Any, total_norm: float) -> None:
    """Scale all gradients so that their global norm is at most ``--clip-grad``; 0 leaves them."""
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, total_norm)
