"""The loss of layers that predict further tokens (``--enable-mtp-training``)."""

from __future__ import annotations

import torch

from miles.backends.base import MicroBatch, ParallelState
from miles.backends.training_utils.collectives import share_places
from miles.backends.training_utils.data import response_tokens
from miles.backends.training_utils.loss_hub.math_utils import log_probs_and_entropy
from miles.backends.training_utils.loss_hub.reduction import Reducer
from miles.backends.training_utils.loss_hub.settings import LossSettings
from miles.backends.training_utils.sequence_layout import SequenceLayout


def further_tokens_loss(
    batch: MicroBatch, reduce: Reducer, settings: LossSettings, parallel: ParallelState
) -> torch.Tensor:
    """-log p of the response tokens by each of these layers, and the mean over layers; 0-d, with gradient.

    Reduced as all losses are, over the same tokens; one that a layer does not predict, as nothing stands far enough
    before it, counts 0. The temperature is 1: they are to predict the model, not to sample like it.
    """
    layout = batch.layout or SequenceLayout(tuple(batch.total_lengths))
    every, losses = response_tokens(batch), []
    for ahead, logits in enumerate(batch.further_logits, 1):
        found = layout.predicting_rows(batch.response_lengths, ahead=ahead)
        rows, places = (part.to(logits.device) for part in found)
        values, _ = log_probs_and_entropy(
            logits,
            rows,
            every[places],
            temperature=1.0,
            vocab_size=settings.vocab_size,
            tp_group=parallel.tp_group,
            chunk_size=settings.chunk_size,
            with_entropy=False,
        )
        if layout.cp_size > 1:
            values = share_places(values, places, len(every), parallel.cp_group)
        else:
            values = values.new_zeros(len(every)).index_put((places,), values)
        losses.append(reduce(-values))
    return torch.stack(losses).mean()
