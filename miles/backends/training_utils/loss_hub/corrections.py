"""Corrections for the distance between the engine's probabilities and the trainer's (truncated importance sampling).

Functions with the signature of ``--custom-tis-function-path``. They return the losses per token, masks of the tokens
that count, and metrics per token.
"""

from __future__ import annotations

from typing import Any

import torch

Correction = tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]


def vanilla_tis_function(
    args: Any,
    *,
    pg_loss: torch.Tensor,
    train_log_probs: list[torch.Tensor],
    rollout_log_probs: list[torch.Tensor],
    loss_masks: list[torch.Tensor],
    **_: Any,
) -> Correction:
    """Losses times ``w = p_trainer / p_engine``, held within [``--tis-clip-low``, ``--tis-clip``]."""
    weight = _ratio(train_log_probs, rollout_log_probs)
    clipped = weight.clamp(_bound(args, "tis_clip_low", 0.0), _bound(args, "tis_clip", 2.0))
    metrics = {"tis": weight, "tis_clipfrac": (clipped != weight).float(), "tis_abs": (weight - 1).abs()}
    return pg_loss * clipped, loss_masks, metrics


def icepop_function(
    args: Any,
    *,
    pg_loss: torch.Tensor,
    train_log_probs: list[torch.Tensor],
    rollout_log_probs: list[torch.Tensor],
    loss_masks: list[torch.Tensor],
    **_: Any,
) -> Correction:
    """As ``vanilla_tis_function``, but tokens whose weight is out of bounds count nothing."""
    weight = _ratio(train_log_probs, rollout_log_probs)
    low, high = _bound(args, "tis_clip_low", 0.0), _bound(args, "tis_clip", 2.0)
    kept = torch.where((weight >= low) & (weight <= high), weight, 0.0)
    metrics = {"tis": weight, "tis_clipfrac": (kept != weight).float(), "tis_abs": (weight - 1).abs()}
    return pg_loss * kept, loss_masks, metrics


def _ratio(train_log_probs: list[torch.Tensor], rollout_log_probs: list[torch.Tensor]) -> torch.Tensor:
    return (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()


def _bound(args: Any, name: str, default: float) -> float:
    value = getattr(args, name, None)
    return default if value is None else float(value)
