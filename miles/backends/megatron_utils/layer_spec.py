"""Transformer layers of plain torch operators, for CPU and CUDA: no Transformer Engine, no Apex.

megatron.core's own layers without those libraries know no packed sequences ("thd"); RMSNorm and core attention here
do. Everything else of a layer (parallel linears, MLP, rotary embedding, residuals) is megatron.core's.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


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

    Constructor and call are those of megatron.core's ``DotProductAttention``.
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
        """``[T, heads, d]``, ``[T, kv heads, d]`` twice -> ``[T, heads * d]``. There is no other mask than causal."""
        assert packed_seq_params is not None, "batches are packed"
        dropout = self.dropout if self.training else 0.0
        parts = [torch.split(part, packed_seq_params.lengths) for part in (query, key, value)]
        # Heads differ between tensor-parallel ranks, so their dropout has to.
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            outputs = [self._attend(q, k, v, dropout) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        output = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)


def packed(cu_seqlens: torch.Tensor, lengths: list[int]) -> PackedSeqParams:
    """Parameters of sequences of ``lengths`` tokens that begin at ``cu_seqlens``, int32 ``[n + 1]``.

    The maximum is the true one: megatron.core's unfused rotary embedding takes a maximum that equals the total for
    "positions run through all sequences", which is right only for a single one.
    """
    longest = max(lengths)
    params = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
    # Known already: each layer would have to wait for the device to know them.
    params.lengths = lengths
    return params


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """All layers of a decoder and its final norm."""
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
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    layer = ModuleSpec(
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
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)
