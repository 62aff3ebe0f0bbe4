"""Whole rollouts through ``RolloutTrainer`` on a real backend, in the calling rank."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data
from support import backend_cases, megatron_cases
from support.plain_losses import flags, random_train_data

BACKENDS = {
    "megatron": ("miles.backends.megatron_utils.backend", "MegatronBackend"),
    "fsdp": ("miles.backends.fsdp_utils.backend", "FSDPBackend"),
}


def args_of(kind: str, path: Path, **changed: Any) -> Any:
    """Flags of a small run with one optimizer step per rollout of eight samples, by plain SGD."""
    args = (megatron_cases if kind == "megatron" else backend_cases).backend_args(path)
    vars(args).update(vars(flags()), use_kl_loss=False, entropy_coef=0.0, seed=1, global_batch_size=8)
    vars(args).update(optimizer="sgd", sgd_momentum=0.0, lr=0.1, min_lr=0.0, num_steps_per_rollout=1, clip_grad=0.0)
    vars(args).update(changed)
    return args


def trainer_of(kind: str, path: Path, **changed: Any) -> RolloutTrainer:
    """Its backend is ready; close that at the end."""
    module, name = BACKENDS[kind]
    backend = getattr(importlib.import_module(module), name)(args_of(kind, path, **changed))
    backend.init()
    return RolloutTrainer(backend.args, backend, Timers(backend.device))


def train(trainer: RolloutTrainer, rollout_id: int = 0, *, seed: int = 3) -> dict[str, float]:
    """On random samples; old log-probabilities are those of the trainer."""
    parallel = trainer.backend.parallel
    trainer.args.dp_size = parallel.dp_size
    data = {name: column for name, column in random_train_data(seed, vocab=300).items() if name != "log_probs"}
    part = split_train_data(trainer.args, data)[parallel.dp_rank]
    return trainer.train(rollout_id, lambda: part)


def weights_of(trainer: RolloutTrainer) -> dict[str, torch.Tensor]:
    """Copies, by Hugging Face name."""
    return {name: tensor.clone() for name, tensor in trainer.backend.hf_weights()}


def trained(kind: str, path: Path, changed: dict[str, Any], rollouts: int = 1) -> tuple[Any, dict[str, torch.Tensor]]:
    """Metrics of each rollout, and the weights at the end."""
    trainer = trainer_of(kind, path, **changed)
    metrics = [train(trainer, number, seed=3 + number) for number in range(rollouts)]
    weights = weights_of(trainer)
    trainer.backend.close()
    return metrics, weights


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each of them, to an absolute tolerance."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
