"""The Megatron model that a Hugging Face config and the flags describe."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import (
    get_expert_tensor_parallel_world_size,
    is_pipeline_first_stage,
    is_pipeline_last_stage,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from miles.backends.megatron_utils.errors import UnsupportedParallelism
from miles.backends.megatron_utils.families import Shape
from miles.backends.megatron_utils.flag_fields import TRANSFORMER, fields
from miles.backends.megatron_utils.layer_spec import block_spec, packed
from miles.backends.megatron_utils.mtp import mtp_block
from miles.backends.megatron_utils.value_head import ValueHead
from miles.backends.training_utils.hooks import takes, trainer_hook
from miles.backends.training_utils.sequence_layout import SequenceLayout
from miles.rollout.hooks import Hook
from miles.utils.misc import load_function

PADDED_LOGIT = -1e30
"""Of rows that only pad the vocabulary: no probability, and finite, so that 0 times it is 0."""


def transformer_config(args: Namespace, shape: Shape, dtype: torch.dtype) -> TransformerConfig:
    """What the layers need to know. The architecture is that of the Hugging Face config."""
    _check_tensor_parallel(shape, args.tensor_model_parallel_size)
    can_fuse = torch.cuda.is_available() and getattr(args, "bias_swiglu_fusion", True)
    return TransformerConfig(
        **{"attention_dropout": 0.0, "hidden_dropout": 0.0, **fields(args, TRANSFORMER)},
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        **_experts(shape),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # All weights come from a directory. Initialising must still run: it marks what is tensor-parallel.
        init_method=_leave,
        output_layer_init_method=_leave,
        # Losses are scaled by their functions; so nothing divides by micro-batches or data-parallel ranks.
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        # Kernels of libraries that the layers here do without.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
        apply_rope_fusion=False,
        bias_activation_fusion=bool(can_fuse),
    )


def _experts(shape: Shape) -> dict[str, Any]:
    """Fields for a mixture of experts. Without one, still a dispatcher: sequences of different lengths ask for it."""
    chosen: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    experts = shape.experts
    if experts is None:
        return chosen
    return {
        **chosen,
        # Losses that balance experts are scaled for gradients that are divided by tokens, as ours are not.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        # Probabilities among all experts, or among the chosen ones only (the same as dividing by their sum).
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_layer_freq": [int(layer in experts.layers) for layer in range(shape.layers)],
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
    }


def build_model(args: Namespace, shape: Shape, config: TransformerConfig, *, is_critic: bool = False) -> Any:
    """This pipeline stage's part, without weights: parameters hold whatever memory held. Built by
    ``--custom-model-provider-path`` if that is given. A critic has a value head in place of the vocabulary.

    Raises:
        HookFailed, BadHookResult: Of the user's function.
    """
    model = _build(args, shape, config)
    if is_critic and model.post_process:
        model.output_layer = ValueHead(config)
    if shape.experts is not None:
        _mark_whole_experts(model, config)
    return model


def _mark_whole_experts(model: Any, config: TransformerConfig) -> None:
    """Experts that are whole on each of several tensor-parallel ranks, with no expert-parallel ones: each rank gives
    them its own rows of a sequence. megatron.core would not add the gradients up, and count them in the norm each."""
    if config.tensor_model_parallel_size == 1 or config.expert_model_parallel_size > 1:
        return
    if get_expert_tensor_parallel_world_size() > 1:
        return
    for name, parameter in model.named_parameters():
        if ".local_experts." in name:
            parameter.sequence_parallel, parameter.tensor_model_parallel = True, False


def _build(args: Namespace, shape: Shape, config: TransformerConfig) -> Any:
    first, last = is_pipeline_first_stage(), is_pipeline_last_stage()
    provider = trainer_hook(args, "custom_model_provider_path")
    if provider is None:
        return default_model(args, shape, config, pre_process=first, post_process=last)
    more = {"vp_stage": None} if takes(provider.function, pre_process=first, post_process=last, vp_stage=None) else {}
    model = provider.call(pre_process=first, post_process=last, **more)
    if not isinstance(model, MegatronModule):
        raise provider.bad_result(model, "a model of megatron-core")
    return model


def default_model(
    args: Namespace, shape: Shape, config: TransformerConfig, *, pre_process: bool, post_process: bool
) -> GPTModel:
    """What is built without a function of the user's."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec_of(args, config),
        vocab_size=padded_vocab(args, shape.vocab),
        max_sequence_length=shape.max_positions,
        parallel_output=True,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope.base,
    )
    frequencies = shape.rope.inverse_frequencies(shape.head_dim)
    model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
    if shape.mtp_layers and post_process:
        model.mtp = mtp_block(config, shape.mtp_layers)
    return model


def layer_spec_of(args: Namespace, config: TransformerConfig) -> Any:
    """``--spec module function``: what the function makes of (args, config, vp_stage), or the spec that is under that
    name; without it, ours.

    Raises:
        CannotLoad, ImportFailed, HookFailed, BadHookResult: Of the user's module.
    """
    named = getattr(args, "spec", None)
    if not named:
        return block_spec(config)
    path = ".".join(named)
    hook = Hook("--spec", " ".join(named), load_function(path, sync_required=True, flag="--spec"))
    spec = hook.function
    if not isinstance(spec, ModuleSpec | TransformerBlockSubmodules):
        spec = hook.call(args, config, None)
    if not isinstance(spec, ModuleSpec | TransformerBlockSubmodules):
        raise hook.bad_result(spec, "a ModuleSpec, or TransformerBlockSubmodules")
    return spec


def padded_vocab(args: Namespace, vocab: int) -> int:
    """Rows of the embedding: a multiple of ``--make-vocab-size-divisible-by`` on each tensor-parallel rank."""
    multiple = int((getattr(args, "make_vocab_size_divisible_by", None) or 1) * args.tensor_model_parallel_size)
    return math.ceil(vocab / multiple) * multiple


def output_of(model: Any, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Of this rank's row of packed sequences, or of rows of one sequence each, through whatever wraps the model: on the
    last pipeline stage logits ``[1, rows, V / tp]``, or ``[B, P, V / tp]``, in the model's dtype, on others what the
    next one goes on with.

    ``tokens``: int64 ``[rows]``.
    """
    # Rotary positions come from `packed`, or are 0 to P - 1; the embedding has none of its own.
    padded = layout.width is not None
    output: torch.Tensor = model(
        input_ids=tokens.view(len(layout.lengths) if padded else 1, -1),
        position_ids=None,
        attention_mask=None,
        packed_seq_params=None if padded else packed(layout, tokens.device),
    )
    return output


def hide_padding(logits: torch.Tensor, vocab: int, tp_rank: int) -> torch.Tensor:
    """``[T, V / tp]`` with :data:`PADDED_LOGIT` in columns from ``vocab`` on; in place."""
    columns = logits.shape[-1]
    valid = min(max(vocab - tp_rank * columns, 0), columns)
    if valid < columns:
        logits[:, valid:] = PADDED_LOGIT
    return logits


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check_tensor_parallel(shape: Shape, size: int) -> None:
    """Megatron cuts heads, the MLP and (fewer than ranks, or not) key-value heads evenly."""
    whole = shape.kv_heads % size == 0 or size % shape.kv_heads == 0
    if shape.heads % size or shape.ffn % size or not whole:
        raise UnsupportedParallelism(
            f"--tensor-model-parallel-size {size} does not divide the model",
            evidence=f"{shape.heads} heads, {shape.kv_heads} key-value heads, MLP of {shape.ffn}",
            advice="Choose a size that divides them.",
        )
