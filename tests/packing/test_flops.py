"""FLOPs by formula next to what torch counts when it runs the model, for each way that models are built."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from miles.backends.fsdp_utils.lora import attach
from miles.utils.flops import adapter_flops, flops_factors, forward_flops, sample_costs, training_flops
from miles.utils.lora import MODULES, LoraSettings

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


def settings(targets=MODULES, kind="canonical_lora"):
    return LoraSettings(rank=6, alpha=6, dropout=0.0, kind=kind, targets=targets, seed=1)


@pytest.mark.parametrize("lora", [None, settings(), settings(("q_proj", "o_proj", "down_proj"))])
@pytest.mark.parametrize("model_type", ["llama", pytest.param("qwen3", marks=pytest.mark.long)])
def test_a_step_counts_no_gradient_of_weights_that_are_frozen(model_type, lora):
    config = AutoConfig.for_model(model_type, **(SIZES | MODELS[model_type]))
    config._attn_implementation = "eager"
    model, length = AutoModelForCausalLM.from_config(config), 40
    if lora is not None:
        attach(model, lora, torch.float32)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1) if ".adapter." in name else None
    # The gradient of the first layer's input counts, too.
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(length)[None] % 96).logits
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    plain = config.to_dict()
    # All scores are computed here, forward and backward: twice what the formula counts.
    scores = flops_factors(plain)[1] * length**2
    added = 0.0 if lora is None else adapter_flops(plain, lora) * length
    assert forward == pytest.approx(forward_flops(plain, length) + scores + added, rel=0.01)
    assert forward + counter.get_total_flops() == pytest.approx(
        training_flops(plain, length, lora) + 3 * scores, rel=0.01
    )


def test_experts_count_as_often_as_a_token_goes_through_them_and_a_shared_matrix_once():
    """Of the model above with experts: hidden 32, heads 4 x 16, two groups of keys, two of eight experts of width 24 in
    two layers, one layer of width 80."""
    config = SIZES | MODELS["qwen3_moe"]
    attention = (32 + 64 + 32 + 32) + (64 + 32)  # A of q, k, v once and their B; o
    dense, expert = (32 + 2 * 80) + (80 + 32), (32 + 2 * 24) + (24 + 32)
    expected = 2 * 6 * (3 * attention + dense + 2 * 2 * expert)
    assert adapter_flops(config, settings(kind="lora")) == expected
    without_sharing = 2 * 6 * (3 * 2 * 32 + (1 + 2 * 2) * 32)
    assert adapter_flops(config, settings()) == expected + without_sharing
