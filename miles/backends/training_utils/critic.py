"""PPO's critic: a second model of the actor's architecture with one value per token, in the actor's ranks.

It has the actor's layout over ranks, so that its values are where the actor's log-probs are, and nothing travels. Per
rollout: values of all response tokens (no gradient), from which advantages and returns are made; then optimizer steps
on the clipped value loss. ``V_t`` is read where token t is predicted: it is the value of what stands before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miles.backends.base import MicroBatch, TrainBackend
from miles.backends.checkpoint_layout import (
    FoundCheckpoint,
    find_checkpoint,
    holds_adapter,
    is_hf_directory,
    iteration_name,
)
from miles.backends.training_utils import log_utils
from miles.backends.training_utils.data import RankData, pieces
from miles.backends.training_utils.loss_hub.losses import LOSS_COLUMNS, Losses
from miles_agents.errors import ConfigError

SUFFIX = "_critic"


class CriticElsewhere(ConfigError):
    """The checkpoints of actor and critic are not of the same rollout."""

    code = "E-TRAIN-021"


def has_critic(args: Any) -> bool:
    """Whether the run trains one."""
    return getattr(args, "advantage_estimator", "grpo") == "ppo" and getattr(args, "loss_type", "") != "sft_loss"


def critic_args(args: Any) -> Any:
    """The flags as the critic's backend sees them: its own checkpoints, learning rate and warm-up.

    Without a checkpoint of its own, its layers begin as the actor's do.
    """
    found = copy.copy(args)
    for name in ("load", "save", "lr", "lr_warmup_iters"):
        setattr(found, name, getattr(args, f"critic_{name}", None))
    if found.lr is None:
        found.lr = args.lr
    found.lr_warmup_iters = found.lr_warmup_iters or 0
    if found.save is None and getattr(args, "save", None):
        found.save = str(args.save).rstrip("/") + SUFFIX
    actor = find_checkpoint(args.load, args.ckpt_step)
    found.load, found.ckpt_step = _own_checkpoint(args, found.save, actor)
    if found.load is None and args.load is not None and _has_layers(args, actor):
        found.ref_load, found.ref_ckpt_step = str(args.load if actor is None else actor.directory), None
    found.use_kl_loss, found.kl_coef, found.opd_type = False, 0.0, None
    found.lora_rank = 0  # all of a critic is trained: what it is to learn is not in the weights that it begins with
    return found


def _has_layers(args: Any, actor: FoundCheckpoint | None) -> bool:
    """Whether ``--load`` gives layers to begin with: an adapter has none, the weights below do."""
    return is_hf_directory(Path(args.load)) if actor is None else not holds_adapter(actor.directory)


def _own_checkpoint(args: Any, save: str | None, actor: FoundCheckpoint | None) -> tuple[str | None, int | None]:
    """Directory and rollout of the critic's checkpoint.

    Where the actor goes on, it is that of the actor's rollout: after a crash between the two the critic's newest may be
    ahead, as it is written first. It is looked for where this run writes it, if the actor goes on from there, then in
    ``--critic-load``, or without that beside ``--load``. Else it is ``--critic-load``, as it is.
    """
    if actor is None or actor.rollout_id is None or getattr(args, "finetune", False):
        return args.critic_load, getattr(args, "critic_ckpt_step", None)
    root = str(args.load).rstrip("/")
    goes_on_there = getattr(args, "save", None) is not None and str(args.save).rstrip("/") == root
    places = [save if goes_on_there else None, args.critic_load or root + SUFFIX]
    there = [place for place in places if place is not None and find_checkpoint(place) is not None]
    for place in there:
        if (Path(place) / iteration_name(actor.rollout_id)).is_dir():
            return place, actor.rollout_id
    if args.critic_load is not None or not there:
        return args.critic_load, getattr(args, "critic_ckpt_step", None)
    return there[0], actor.rollout_id  # which is told to be missing


class Critic:
    """See the module's docstring. Its methods are collective over all ranks.

    Args:
        args: Of ``critic_args``.
        backend: Initialised, in the role of critic.
    """

    def __init__(self, args: Any, backend: TrainBackend) -> None:
        self.args = args
        self.backend = backend
        self._losses = Losses(args, backend.parallel)

    def fill_values(self, data: RankData) -> None:
        """The column ``values``: float32 ``[R_i]`` each, on ranks with logits."""
        batches = [data.micro_batch(samples, self.backend.device) for samples in data.forward]

        def values(output: torch.Tensor, batch: MicroBatch) -> list[torch.Tensor]:
            return pieces(self._losses.values(output, batch), batch.response_lengths)

        outputs = self.backend.forward_only(batches, values)
        found: dict[int, torch.Tensor] = {}
        for batch, output in zip(batches, outputs, strict=False):
            found |= zip(batch.sample_positions, output, strict=False)
        if outputs:
            data.columns["values"] = [found[i].cpu() for i in range(len(data))]

    def train(self, rollout_id: int, data: RankData, running: Callable[[int], None]) -> dict[str, float]:
        """All steps of a rollout; metrics ``train/critic-...``. ``running`` is told the number of each step."""
        backend, steps = self.backend, []
        for number, step in enumerate(data.steps):
            running(number)
            batches = [data.micro_batch(samples, backend.device, LOSS_COLUMNS) for samples in step.micro_batches]
            outcome = backend.train_step(batches, self._losses.value_loss_for(step))
            found = log_utils.step_metrics(outcome, backend.parallel, backend.device)
            log_utils.check_finite(self.args, found, f"rollout {rollout_id}, step {number} of the critic")
            steps.append(found)
        means = log_utils.mean_over_steps(steps)
        return {name.replace("train/", "train/critic-", 1): value for name, value in means.items()}


def check_same_start(actor: int, critic: int, args: Any) -> None:
    """Of resumed runs: both at the same rollout, or a fresh critic beside a trained actor.

    Raises:
        CriticElsewhere.
    """
    if critic not in (0, actor):
        raise CriticElsewhere(
            "the checkpoints of actor and critic are not of the same rollout",
            evidence=f"the actor goes on at rollout {actor}, the critic ({args.load}) at {critic}",
            advice="Give --critic-load and --load of the same run; --ckpt-step names a rollout that both have.",
        )
