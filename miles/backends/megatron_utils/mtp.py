"""Layers that predict further tokens ("multi-token prediction", DeepSeek-V3), trained beside the model and without it.

Layer k (from 1) takes the hidden state of layer k - 1 at position i (layer 0 is the model, behind its final norm) and
the embedding of token i + k, and predicts token i + k + 1 with the model's own output layer. Hidden state, embedding
and output layer come in without gradient: what these layers learn changes nothing of the model.

The layers are megatron.core's. Its own way to train them is not used: it adds a loss of its own scale to the gradient
of the hidden states, and cuts neither model nor vocabulary off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from miles.backends.megatron_utils.errors import UnsupportedParallelism, UnsupportedSetting
from miles.backends.megatron_utils.layer_spec import RMSNorm, layer_spec
from miles.backends.training_utils.sequence_layout import SequenceLayout


class MTPLayer(MultiTokenPredictionLayer):  # type: ignore[misc]  # megatron.core has no types
    """One of them, with the embeddings of further tokens as an input."""

    def forward(self, hidden_states: torch.Tensor, decoder_input: torch.Tensor, **attention: Any) -> torch.Tensor:
        """``[rows, 1, H]`` each, or ``[P, B, H]``; of sequence-parallel ranks their part."""
        output: torch.Tensor = self._proj_and_transformer_layer(
            hidden_states=hidden_states, decoder_input=decoder_input, **attention
        )
        return output


def mtp_block(config: TransformerConfig, layers: int) -> MultiTokenPredictionBlock:
    """As megatron.core names and saves it."""
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=RMSNorm,
        hnorm=RMSNorm,
        eh_proj=ColumnParallelLinear,
        transformer_layer=layer_spec(config),
        layer_norm=RMSNorm,
    )
    specs = [ModuleSpec(module=MTPLayer, submodules=submodules)] * layers
    return MultiTokenPredictionBlock(config=config, spec=MultiTokenPredictionBlockSubmodules(layer_specs=specs))


@dataclass
class _Decoded:
    """What the decoder gave for a micro-batch, and what its layers took besides."""

    hidden: torch.Tensor
    attention: dict[str, Any]


class MTPTraining:
    """Of one model on one rank.

    Args:
        model: With its ``mtp``; not wrapped.

    Raises:
        UnsupportedSetting: It has none: it is the user's own.
    """

    def __init__(self, model: Any) -> None:
        if getattr(model, "mtp", None) is None:
            raise UnsupportedSetting(
                "this model has no layers that predict further tokens",
                evidence=f"it is a {type(model).__name__} without mtp",
                advice="Leave --mtp-num-layers and --enable-mtp-training out with a model of your own.",
            )
        self._model = model
        self._decoded: _Decoded | None = None
        model.decoder.register_forward_hook(self._remember, with_kwargs=True)

    def logits(self, tokens: torch.Tensor, layout: SequenceLayout) -> list[torch.Tensor]:
        """float ``[rows, V / tp]`` of each layer in turn, after a forward pass of the model.

        Args:
            tokens: int64 ``[T]``, packed.
            layout: Where they lie in this rank's rows.
        """
        decoded, self._decoded = self._decoded, None
        assert decoded is not None, "the model was not called"
        hidden, found = decoded.hidden, []
        tied = self._model.share_embeddings_and_output_weights
        head = self._model.shared_embedding_or_output_weight() if tied else self._model.output_layer.weight
        for number, layer in enumerate(self._model.mtp.layers, 1):
            hidden = layer(hidden, self._embedding(tokens, layout, number), **decoded.attention)
            logits, _ = self._model.output_layer(hidden, weight=head.detach())
            found.append(logits.transpose(0, 1).flatten(0, 1))
        return found

    def _remember(self, _decoder: Any, _args: Any, given: dict[str, Any], hidden: torch.Tensor) -> None:
        if self._model.training:
            names = ("attention_mask", "rotary_pos_emb", "packed_seq_params")
            self._decoded = _Decoded(hidden.detach(), {name: given.get(name) for name in names})

    def _embedding(self, tokens: torch.Tensor, layout: SequenceLayout, ahead: int) -> torch.Tensor:
        """Of the token so many positions ahead in the same sample; behind its end, of token 0."""
        index = layout.token_index.to(tokens.device)
        ends = torch.repeat_interleave(
            torch.tensor(layout.lengths).cumsum(0), torch.tensor(layout.lengths), output_size=len(tokens)
        ).to(tokens.device)
        inside = (index >= 0) & (index + ahead < ends[index.clamp(min=0)])
        further = torch.where(inside, tokens[(index + ahead).clamp(0, len(tokens) - 1)], 0)
        rows = len(layout.lengths) if layout.width is not None else 1
        with torch.no_grad():
            embedded: torch.Tensor = self._model.embedding(input_ids=further.view(rows, -1), position_ids=None)
        return embedded


def make_mtp(args: Any, model: Any, layers: int, *, stages: int) -> MTPTraining | None:
    """Of the model that is trained; None: they are not trained, and stay as they were loaded.

    Raises:
        UnsupportedParallelism: There are several pipeline stages, the last of which has no embedding to read.
    """
    if not layers:
        return None
    if stages > 1:
        raise UnsupportedParallelism(
            "layers that predict further tokens are not built with pipeline stages",
            evidence=f"--mtp-num-layers {layers}, --pipeline-model-parallel-size {stages}",
            advice="Leave --mtp-num-layers out, or use --pipeline-model-parallel-size 1.",
        )
    if getattr(args, "enable_mtp_training", False):
        return MTPTraining(model)
    if getattr(model, "mtp", None) is not None:
        model.mtp.requires_grad_(False)
    return None
