"""Advantages per token from rewards per sample. Written into the rank's data as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from miles.backends.base import ParallelState
from miles.backends.training_utils.collectives import all_reduce_sum
from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.loss_hub import estimators
from miles.backends.training_utils.loss_hub.estimators import grpo_returns as get_grpo_returns
from miles.backends.training_utils.loss_hub.math_utils import compute_approx_kl
from miles.backends.training_utils.loss_hub.settings import AdvantageSettings
from miles_agents.errors import ConfigError

__all__ = ["MissingColumn", "NoTrainedToken", "compute_advantages_and_returns", "get_grpo_returns", "whiten"]

CPU = torch.device("cpu")


class NoTrainedToken(ConfigError):
    """Advantages are to be normalised, and no token of the rollout is trained."""

    code = "E-TRAIN-005"


class MissingColumn(ConfigError):
    """An estimator needs numbers of the samples that they do not have, or of another length."""

    code = "E-TRAIN-020"


def compute_advantages_and_returns(
    args: Any, parallel: ParallelState, data: RankData, device: torch.device = CPU
) -> None:
    """Fill the columns ``advantages`` and ``returns``: float32 ``[R_i]`` each, and ``opd_reverse_kl`` where it counts.

    By ``--advantage-estimator``: see ``estimators``. Rewards come from the rollout side, where those of GRPO, GSPO and
    REINFORCE++-baseline have been made relative to the prompt's others. On-policy distillation comes on top, then
    ``--normalize-advantages``. Nothing to do for supervised fine-tuning, with
    ``--disable-compute-advantages-and-returns``, and on ranks without logits, which have nothing to compute from.

    Collective over ``dp_group`` with ``--normalize-advantages``; ``device`` is that of its collectives. Every rank of a
    context-parallel group has all tokens of its samples, so they whiten alike.

    Raises:
        MissingColumn: An estimator needs what the samples do not have. NoTrainedToken.
    """
    wanted = getattr(args, "compute_advantages_and_returns", True) and getattr(args, "loss_type", None) != "sft_loss"
    if not wanted or "rewards" not in data.columns or not parallel.has_logits:
        return
    settings = AdvantageSettings.from_args(args)
    advantages, returns = _estimate(settings, data)
    if settings.use_opd:
        data.columns["opd_reverse_kl"] = _reverse_kl(settings, data)
        advantages = estimators.distilled(advantages, data.columns["opd_reverse_kl"], coef=settings.opd_kl_coef)
    data.columns["returns"] = returns
    if getattr(args, "normalize_advantages", False):
        advantages = whiten(advantages, data.loss_masks, parallel, device)
    data.columns["advantages"] = advantages


def _estimate(settings: AdvantageSettings, data: RankData) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rewards, lengths = data.columns["rewards"], data.response_lengths
    if settings.estimator == "on_policy_distillation":
        nothing = [torch.zeros(length) for length in lengths]
        return nothing, nothing
    if settings.estimator in ("grpo", "gspo"):
        returns = estimators.grpo_returns(rewards, lengths)
        return returns, returns
    kls, kl_coef = _shaping_kl(settings, data), settings.kl_coef
    if settings.estimator == "reinforce_plus_plus_baseline":
        returns = estimators.reinforce_plus_plus_baseline_advantages(rewards, kls, kl_coef=kl_coef)
        return returns, returns
    if settings.estimator == "reinforce_plus_plus":
        returns = estimators.reinforce_plus_plus_returns(
            rewards, kls, data.loss_masks, kl_coef=kl_coef, gamma=settings.gamma
        )
        return returns, returns
    values = _needed(data, "values", "the critic's values")
    return estimators.gae(
        rewards, values, kls, data.loss_masks, kl_coef=kl_coef, gamma=settings.gamma, lambd=settings.lambd
    )


def _shaping_kl(settings: AdvantageSettings, data: RankData) -> list[torch.Tensor]:
    """KL of the policy that generated against the reference, per token; zeros if it counts nothing."""
    if not settings.kl_coef:
        return [torch.zeros(length) for length in data.response_lengths]
    old = _needed(data, settings.old_column, "log-probs of the policy")
    reference = _needed(data, "ref_log_probs", "log-probs of the reference")
    return [compute_approx_kl(p, q, settings.kl_loss_type) for p, q in zip(old, reference, strict=True)]


def _reverse_kl(settings: AdvantageSettings, data: RankData) -> list[torch.Tensor]:
    """``log p_student - log p_teacher`` of each token, or what the rollout computed of several tokens."""
    lengths = data.response_lengths
    if "opd_reverse_kl" in data.columns:
        found = [torch.as_tensor(values, dtype=torch.float32) for values in data.columns["opd_reverse_kl"]]
    else:
        student = _needed(data, settings.old_column, "log-probs of the student")
        teacher = _needed(data, "teacher_log_probs", "log-probs of the teacher")
        teacher = [torch.as_tensor(values, dtype=torch.float32) for values in teacher]
        _check_lengths(teacher, lengths, "teacher_log_probs")
        found = [p - q for p, q in zip(student, teacher, strict=True)]
    _check_lengths(found, lengths, "opd_reverse_kl")
    return found


def _check_lengths(values: Sequence[torch.Tensor], lengths: Sequence[int], name: str) -> None:
    wrong = [i for i, (value, length) in enumerate(zip(values, lengths, strict=True)) if len(value) != length]
    if wrong:
        raise MissingColumn(
            f"{name} of {len(wrong)} samples has another length than their responses",
            evidence=f"sample {wrong[0]} of this rank: {len(values[wrong[0]])} for {lengths[wrong[0]]} tokens",
            advice="Let it have one number for each response token.",
        )


def _needed(data: RankData, name: str, what: str) -> list[torch.Tensor]:
    if name not in data.columns:
        raise MissingColumn(
            f"advantages need {what}, which the samples do not have",
            evidence=f"there is no column {name}; there are {', '.join(sorted(data.columns)) or 'none'}",
            advice="Let the generate function fill it in, or choose another --advantage-estimator.",
        )
    return data.columns[name]


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
