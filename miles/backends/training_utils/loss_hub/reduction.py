"""From one number per token to one number per step.

Losses and metrics are weighted sums over all response tokens of an optimizer step. A micro-batch contributes its part
of the sum; what divides is in the weights already, so that parts are only ever added, over micro-batches and ranks:

* per sample: ``m_t / max(D_i, 1) / G``, with the mask ``m``, ``D_i`` the mask total of all samples that share sample
  i's rollout id, and ``G`` the rollouts of the step;
* per token (``--calculate-per-token-loss``): ``m_t / N``, with ``N`` the trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from miles.backends.base import MicroBatch
from miles.backends.training_utils.data import StepPlan, pieces


class Reducer:
    """Weighted sum over the response tokens of a micro-batch. Called with a flat tensor ``[sum R_i]``."""

    def __init__(self, batch: MicroBatch, step: StepPlan, *, per_token: bool) -> None:
        self.divisor = step.num_tokens if per_token else float(step.num_rollouts)
        self._per_token = per_token
        self._lengths = batch.response_lengths
        self._device = batch.tokens.device
        own = [float(mask.sum()) for mask in batch.loss_masks] if "rollout_mask_sums" not in batch.columns else []
        totals = batch.columns.get("rollout_mask_sums", own)
        self._sample_divisors = [max(float(total), 1.0) for total in totals]
        self.mask = _cat(batch.loss_masks, self._device)
        self.active = self.mask > 0
        self._weights = self.weights(batch.loss_masks)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """0-d. What is not trained does not count, whatever it is."""
        return (torch.where(self.active, values, 0.0) * self._weights).sum()

    def weights(self, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[sum R_i]``: for other masks, such as those of a correction. The divisors stay those of the batch's own."""
        if self._per_token:
            return _cat(masks, self._device) / self.divisor
        means = [mask / divisor for mask, divisor in zip(masks, self._sample_divisors, strict=True)]
        return _cat(means, self._device) / self.divisor

    def with_masks(self, values: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """As a call, with other masks."""
        active = _cat(masks, self._device) > 0
        return (torch.where(active, values, 0.0) * self.weights(masks)).sum()

    def per_sample(self, values: Sequence[torch.Tensor], num_trained: Sequence[float]) -> torch.Tensor:
        """Of one 0-d value per sample, averaged over samples or, in per-token mode, over trained tokens."""
        total = torch.zeros((), device=self._device)
        for value, count in zip(values, num_trained, strict=True):
            total = total + (value * count if self._per_token else value)
        return total / self.divisor

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """One tensor per sample."""
        return pieces(values, self._lengths)


def _cat(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([tensor.float() for tensor in tensors]) if tensors else torch.zeros(0, device=device)
