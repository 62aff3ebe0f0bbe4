"""No flag of the documented command line is refused because its feature is missing: each is walked with each of its
values, on a CPU and on GPUs, beside what it needs. What is refused nevertheless is listed with the reason."""

from dataclasses import replace

import pytest
from support.flag_cases import CHECKPOINT, DATA, FACTS, GPUS, MODEL, QWEN3, outcome
from support.flag_contract import CHOICES, CONTRACT, NOT_BUILT

from miles.flags.table import table

ROWS = [line.split(" | ") for line in CONTRACT.splitlines()]
MOE = {
    **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "router_aux_loss_coef": 0.0,
}  # fmt: skip
