"""Which flag reaches which field of megatron-core's configurations: data, of which tests are made, too.

A flag is left out where its value is None, or where the namespace lacks it: megatron-core's default holds then.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


TRANSFORMER: Mapping[str, str] = {
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
} | _same(
    "attention_dropout",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "context_parallel_size",
    "deterministic_mode",
    "disable_bf16_reduced_precision_matmul",
    "distribute_saved_activations",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "hidden_dropout",
    "pipeline_model_parallel_size",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "recompute_num_layers",
    "sequence_parallel",
    "tensor_model_parallel_size",
)
"""Of ``TransformerConfig``, by flag."""

OPTIMIZER: Mapping[str, str] = _same(
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "apply_wd_to_qk_layernorm",
    "clip_grad",
    "decoupled_lr",
    "decoupled_min_lr",
    "lr",
    "min_lr",
    "optimizer",
    "sgd_momentum",
    "weight_decay",
)
"""Of ``OptimizerConfig``, by flag."""

DATA_PARALLEL: Mapping[str, str] = {
    "ddp_bucket_size": "bucket_size",
    "ddp_pad_buckets_for_high_nccl_busbw": "pad_buckets_for_high_nccl_busbw",
    "ddp_reduce_scatter_with_fp32_accumulation": "reduce_scatter_with_fp32_accumulation",
    "overlap_grad_reduce": "overlap_grad_reduce",
}
"""Of ``DistributedDataParallelConfig``, by flag."""


def fields(args: Namespace, table: Mapping[str, str]) -> dict[str, Any]:
    """Values of the configuration's fields."""
    values = {field: getattr(args, flag, None) for flag, field in table.items()}
    return {field: value for field, value in values.items() if value is not None}
