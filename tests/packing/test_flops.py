"""FLOPs by formula next to what torch counts when it runs the model, for each way that models are built."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from miles.utils.flops import flops_factors, forward_flops, sample_costs

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 96,
}
MODELS = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 12,
        "q_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_formula_counts_what_a_forward_pass_multiplies(model_type):
    config = AutoConfig.for_model(model_type, **(SIZES | MODELS[model_type]))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    length = 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None] % 96)
    # Without a causal kernel all scores are computed; the formula counts the half that is needed.
    per_token, per_square = flops_factors(config.to_dict())
    assert counter.get_total_flops() == pytest.approx(per_token * length + 2 * per_square * length**2, rel=0.01)


def test_costs_are_the_flops_of_each_sample_also_of_a_model_in_a_larger_one():
    config = {"model_type": "wrapper", "text_config": SIZES}
    args = SimpleNamespace(hf_config=config)
    assert sample_costs(args, [1, 50, 7]) == [forward_flops(SIZES, length) for length in (1, 50, 7)]
