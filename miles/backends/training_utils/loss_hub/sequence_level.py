"""What losses compute per sequence rather than per token. Flat tensors ``[sum R_i]``, samples in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mean_per_sequence(values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``sum(x m) / max(sum m, 1)`` of each sample, 0-d, with gradient. What is not trained may be anything."""
    return [
        torch.where(mask > 0, value, 0.0).mul(mask).sum() / mask.sum().clamp(min=1.0)
        for value, mask in zip(values, masks, strict=True)
    ]


def expand(per_sequence: Sequence[torch.Tensor], lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Each sample's number for each of its tokens: ``[sum R_i]``."""
    if not per_sequence:
        return torch.zeros_like(like)
    return torch.cat([value.expand(length) for value, length in zip(per_sequence, lengths, strict=True)])


def gspo_kl(log_ratios: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """``old - log p`` averaged over each sequence's trained tokens, for each of its tokens.

    Its ``exp(-x)`` is GSPO's sequence-level importance ratio, the geometric mean of the tokens' ratios; the gradient
    goes through the mean (Zheng et al. 2025, "Group sequence policy optimization", eq. 7).
    """
    return expand(mean_per_sequence(log_ratios, masks), [len(values) for values in log_ratios], like)


def opsm_mask(
    log_ratios: Sequence[torch.Tensor],
    advantages: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    *,
    delta: float,
    like: torch.Tensor,
) -> torch.Tensor:
    """Off-policy sequence masking: 0 for tokens of negative advantage in sequences whose mean ``old - log p`` is above
    ``delta``, else 1. No gradient (DeepSeek-AI 2025, "DeepSeek-V3.2", section on scaling GRPO)."""
    kept = [
        1.0 - ((advantage < 0) & (mean.detach() > delta)).float()
        for advantage, mean in zip(advantages, mean_per_sequence(log_ratios, masks), strict=True)
    ]
    return torch.cat(kept) if kept else torch.ones_like(like)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token ``max((v_c - R)^2, (v - R)^2)`` with ``v_c`` within ``clip`` of the old value; and whether v was
    further from it (float). No factor of one half (Schulman et al. 2017, as in OpenAI's baselines)."""
    moved = values - old_values
    held = old_values + moved.clamp(-clip, clip)
    loss = torch.maximum((held - returns).square(), (values - returns).square())
    return loss, (moved.abs() > clip).float()
