"""Transformer layers of plain torch operators, for CPU and CUDA: no Transformer Engine, no Apex.

megatron.core's own layers without those libraries know no packed sequences ("thd"), no context parallelism and no
sequence-parallel norms; RMSNorm and core attention here do. Everything else of a layer (parallel linears, MLP, experts,
rotary embedding, residuals) is megatron.core's.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from miles.backends.training_utils.sequence_layout import SequenceLayout


class RMSNorm(torch.nn.Module):
    """Root mean square norm (https://arxiv.org/abs/1910.07467), computed in float32 as Hugging Face does."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        # megatron.core's own device, which the shim makes the CPU where there is no CUDA.
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron.core asks
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]``, in the dtype that it has."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Causal attention of several sequences that lie one after the other: each attends to itself only.

    With context parallelism a rank has some queries of each sequence, and gets keys and values of all ranks; what it
    does not need of them (those after its queries) is cut away. Constructor and call are those of megatron.core's
    ``DotProductAttention``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """``[rows, heads, d]``, ``[rows, kv heads, d]`` twice -> ``[rows, heads * d]``; padded ``[P, B, ...]`` each.
        There is no other mask than causal: padding is at the end of a row, and no token looks there."""
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is None:
            return self._padded(query, key, value, dropout)
        layout: SequenceLayout = packed_seq_params.layout
        queries = iter(torch.split(query, [len(p) for chunks in layout.rows_of_chunks for _, p in chunks]))
        keys, values = (_whole_sequences(part, layout) for part in (key, value))
        outputs = []
        # Heads differ between tensor-parallel ranks, so their dropout has to.
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            for chunks, k, v in zip(layout.rows_of_chunks, keys, values, strict=True):
                outputs += [self._attend(next(queries), k[: p.stop], v[: p.stop], dropout) for _, p in chunks]
        return torch.cat(outputs).flatten(1)

    def _padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            output = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale, enable_gqa=True
            )
        return output.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        """The queries are those of the last positions of the keys."""
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        before = len(key) - len(query)
        mask = None
        if before:
            mask = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(before)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not before, scale=self.scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)


def _whole_sequences(part: torch.Tensor, layout: SequenceLayout) -> tuple[torch.Tensor, ...]:
    """Keys or values of all ranks, by sequence and in order. Gradients go back to the rank that a row is of."""
    if layout.cp_size > 1:
        gathered = gather_from_sequence_parallel_region(part, group=get_context_parallel_group())
        part = gathered[layout.gathered_index.to(part.device)]
    return torch.split(part, layout.padded_lengths)


def packed(layout: SequenceLayout, device: torch.device) -> PackedSeqParams:
    """Parameters of the sequences that lie in a row as ``layout`` says.

    The maximum is the true one: megatron.core's unfused rotary embedding takes a maximum that equals the total for
    "positions run through all sequences", which is right only for a single one.
    """
    longest = max(layout.padded_lengths)
    bounds = layout.cu_seqlens.to(device)
    params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    params.layout = layout
    return params


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """This pipeline stage's layers of a decoder, and its final norm."""
    has_experts = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [0] * config.num_layers
    specs = [layer_spec(config, with_experts=bool(moe)) for moe in has_experts]
    first = get_transformer_layer_offset(config)
    own = specs[first : first + get_num_layers_to_build(config)]
    return TransformerBlockSubmodules(layer_specs=own, layer_norm=RMSNorm)


def layer_spec(config: TransformerConfig, *, with_experts: bool = False) -> ModuleSpec:
    """A layer of a decoder."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = ModuleSpec(module=MLP, submodules=linears)
    if with_experts:
        experts = ModuleSpec(module=SequentialMLP, submodules=linears)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
