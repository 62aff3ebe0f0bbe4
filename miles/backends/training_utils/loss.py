"""Losses and advantages under the path that user code imports them from. See ``loss_hub``."""

from __future__ import annotations

from miles.backends.base import LossOutput
from miles.backends.training_utils.loss_hub.advantages import compute_advantages_and_returns, get_grpo_returns, whiten
from miles.backends.training_utils.loss_hub.losses import Losses, clipped_policy_loss
from miles.backends.training_utils.loss_hub.math_utils import compute_approx_kl, log_probs_and_entropy

__all__ = [
    "LossOutput",
    "Losses",
    "clipped_policy_loss",
    "compute_advantages_and_returns",
    "compute_approx_kl",
    "get_grpo_returns",
    "log_probs_and_entropy",
    "whiten",
]
