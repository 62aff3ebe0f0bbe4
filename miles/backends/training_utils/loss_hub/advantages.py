"""Advantages per token from rewards per sample. Written into the rank's data as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from miles.backends.base import ParallelState
from miles.backends.training_utils.collectives import all_reduce_sum
from miles.backends.training_utils.data import RankData
from miles_agents.errors import ConfigError

CPU = torch.device("cpu")


class NoTrainedToken(ConfigError):
    """Advantages are to be normalised, and no token of the rollout is trained."""

    code = "E-TRAIN-005"


def compute_advantages_and_returns(
    args: Any, parallel: ParallelState, data: RankData, device: torch.device = CPU
) -> None:
    """Fill the columns ``advantages`` and ``returns``: float32 ``[R_i]`` each.

    GRPO: every token of a response has the response's reward, which the rollout side has centred (and scaled) within
    its group: ``A_t = r'``. Nothing to do for supervised fine-tuning, and with
    ``--disable-compute-advantages-and-returns``.

    Collective over ``dp_group`` with ``--normalize-advantages``; ``device`` is that of its collectives.
    """
    wanted = getattr(args, "compute_advantages_and_returns", True) and getattr(args, "loss_type", None) != "sft_loss"
    if not wanted or "rewards" not in data.columns:
        return
    advantages = get_grpo_returns(data.columns["rewards"], data.response_lengths)
    data.columns["returns"] = advantages
    if getattr(args, "normalize_advantages", False):
        advantages = whiten(advantages, data.loss_masks, parallel, device)
    data.columns["advantages"] = advantages


def get_grpo_returns(rewards: Sequence[float], response_lengths: Sequence[int]) -> list[torch.Tensor]:
    """``[R_i]`` times the reward."""
    return [
        torch.full((length,), float(reward), dtype=torch.float32)
        for reward, length in zip(rewards, response_lengths, strict=True)
    ]


def whiten(
    values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], parallel: ParallelState, device: torch.device = CPU
) -> list[torch.Tensor]:
    """Mean 0 and variance 1 over the trained tokens of all data-parallel ranks, applied to every token.

    Raises:
        NoTrainedToken: On all ranks alike.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for value, mask in zip(values, masks, strict=True):
        kept = value.double() * mask
        sums += torch.stack([kept.sum(), (kept * value).sum(), mask.double().sum()])
    total, squares, count = all_reduce_sum(sums.to(device), parallel.dp_group).tolist()
    if count <= 0:
        raise NoTrainedToken(
            "advantages cannot be normalised: no token is trained",
            evidence="the loss masks of all samples of this rollout are zero",
            advice="Look at what sets Sample.loss_mask or Sample.remove_sample.",
        )
    mean = total / count
    variance = squares / count - mean**2
    if count >= 2:
        variance *= count / (count - 1)
    scale = (max(variance, 0.0) + 1e-8) ** -0.5
    return [(value - mean) * scale for value in values]
