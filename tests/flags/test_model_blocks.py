"""Model blocks of published recipes: dense ones become the megatron-core configuration of their model; each other one
is refused for what is missing, once."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.flag_cases import FACTS, MODEL, RECIPE, with_directory
from support.ranks import run_ranks, warm_process

from miles.flags.megatron_refused import FAMILY, MLA, MOE, SINKS, WINDOW
from miles.flags.parse import parse
from miles.flags.resolve import resolve
from miles.flags.table import table

BLOCKS = json.loads((Path(__file__).parent / "model_blocks.json").read_text())

QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False, "rope_theta": 1000000}
DENSE = {
    "qwen2.5-0.5B": {
        **QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7B": {
        **QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6B": {
        **QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "qwen3-4B": {
        **QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "llama3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
    "mimo-7B-rl": {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151680,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 640000,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
}
"""``config.json`` of each, as published, without what is not about the model's shape."""

# Of megatron-core's configuration, written down from the models' descriptions.
COLUMNS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "add_qkv_bias",
    "qk_layernorm",
    "vocab",
    "tied",
    "rope_base",
    "rope_factor",
    "context",
)
SHAPES = {
    "qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 1e-6, True, False, 151936, True, 1e6, None, 32768),
    "qwen2.5-7B": (28, 3584, 18944, 28, 4, 128, 1e-6, True, False, 152064, False, 1e6, None, 131072),
    "qwen3-0.6B": (28, 1024, 3072, 16, 8, 128, 1e-6, False, True, 151936, True, 1e6, None, 40960),
    "qwen3-4B": (36, 2560, 9728, 32, 8, 128, 1e-6, False, True, 151936, True, 1e6, None, 40960),
    "llama3.1-8B-Instruct": (32, 4096, 14336, 32, 8, 128, 1e-5, False, False, 128256, False, 5e5, 8.0, 131072),
    "mimo-7B-rl": (*(36, 4096, 11008, 32, 8, 128, 1e-5, True, False, 151680, False, 640000, None, 32768),),
}
SAME_FOR_ALL = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_interleaved": False,
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "window_size": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}

WITH_EXPERTS = {
    **QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
"""``config.json`` of qwen3-30B-A3B, as published."""
EXPERTS = {
    "num_moe_experts": 128,
    "moe_ffn_hidden_size": 768,
    "moe_router_topk": 8,
    "moe_router_pre_softmax": False,
    "moe_router_dtype": "fp32",
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_token_dispatcher_type": "alltoall",
    "moe_layer_freq": [1] * 48,
    "moe_grouped_gemm": False,
    "moe_expert_capacity_factor": None,
    "ffn_hidden_size": 6144,
    "num_query_groups": 4,
    "kv_channels": 128,
    "qk_layernorm": True,
}
"""What megatron-core's configuration has to say of it."""

MISSING = {
    "glm4-32B": [FAMILY],
    "glm4.5-106B-A12B": [FAMILY, MOE],
    "deepseek-v3": [MLA, MOE],
    "kimi-k2": [MLA, MOE],
    "gpt-oss-20b": [SINKS, WINDOW],
    "nemotron-3-nano-4b": [FAMILY],
    "qwen3.5-4B": [FAMILY],
}


def block(name):
    return BLOCKS[name]


def resolved(words, config, *, recipe=RECIPE):
    facts = with_directory("M", replace(MODEL, config=config), FACTS)
    return resolve(parse([*recipe.split(), *words], table()), table(), facts)


def todays(config):
    """As transformers 5 writes it."""
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    rest = {key: value for key, value in config.items() if key not in {"rope_theta", "rope_scaling"}}
    return {**rest, "rope_parameters": rope}


def test_every_block_is_either_dense_or_misses_something():
    assert set(BLOCKS) == {*DENSE, *MISSING, "qwen3-30B-A3B"}
    assert set(DENSE) == set(SHAPES)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_word_of_a_block_is_understood(name):
    told = [problem.what for problem in parse(BLOCKS[name], table()).problems]
    assert all(what.startswith("refused: not built yet: ") for what in told)


@pytest.mark.parametrize("name", MISSING)
def test_a_block_is_refused_once_for_each_thing_that_is_missing(name):
    found = resolved(BLOCKS[name], None).problems
    told = [problem.what.removeprefix("refused: ") for problem in found if problem.what.startswith("refused: ")]
    assert sorted(what.partition(".")[0].partition(" (")[0] for what in told) == sorted(MISSING[name])


def test_all_flags_of_a_missing_feature_are_named_together():
    found = [problem for problem in resolved(BLOCKS["deepseek-v3"], None).problems if MOE in problem.what]
    assert len(found) == 1
    named = f"{found[0].flag} {found[0].what}"
    for word in ("--moe-shared-expert-intermediate-size", "--moe-router-num-groups", "--moe-router-group-topk"):
        assert word in named


def test_a_block_with_experts_agrees_with_its_model():
    typed, untyped = (resolved(words, WITH_EXPERTS) for words in (BLOCKS["qwen3-30B-A3B"], []))
    assert typed.problems == untyped.problems == ()
    different = {key for key, value in typed.config.items() if untyped.config[key] != value}
    # The two that only name kernels are told to have no effect; a coefficient is a list of one once it is typed.
    assert different == {"explicit_flags", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_dtype"} | {
        "moe_aux_loss_coeff"
    }
    assert [notice.partition(" have no effect")[0] for notice in typed.notices if "no effect" in notice] == [
        "--moe-grouped-gemm, --moe-permute-fusion"
    ]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--num-experts 64", "--num-experts"),
        ("--moe-router-topk 4", "--moe-router-topk"),
        ("--moe-ffn-hidden-size 64", "--moe-ffn-hidden-size"),
        ("--moe-layer-freq 2", "--moe-layer-freq"),
        ("--moe-layer-freq x", "--moe-layer-freq"),
        ("--moe-router-pre-softmax", "--moe-router-pre-softmax"),
        ("--moe-aux-loss-coeff 0 1e-3", "--moe-aux-loss-coeff"),
        ("--train-backend fsdp", "--train-backend"),
    ],
)
def test_what_a_model_with_experts_does_not_have_is_told(words, flag):
    assert [problem.flag for problem in resolved(words.split(), WITH_EXPERTS).problems] == [flag]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("form", [dict, todays], ids=["older", "todays"])
def test_a_dense_block_agrees_with_its_model(name, form):
    typed, untyped = (resolved(words, form(DENSE[name])) for words in (block(name), []))
    assert typed.problems == untyped.problems == ()
    different = {key for key, value in typed.config.items() if untyped.config[key] != value}
    own = {"mtp_num_layers"} if "--mtp-num-layers" in block(name) else set()  # 0 leaves them out
    assert different == {"explicit_flags"} | own


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_block_says_the_shape_that_the_table_has(name):
    """Typed alone, without a model directory."""
    typed = parse(block(name), table()).typed
    row = dict(zip(COLUMNS, SHAPES[name], strict=True))
    expected = {
        "vocab_size": row["vocab"],
        "rotary_base": row["rope_base"],
        "rope_scaling_factor": row["rope_factor"],
        "untie_embeddings_and_output_weights": not row["tied"],
        "max_position_embeddings": row["context"],
        **{key: row[key] for key in COLUMNS[:9]},
    }
    assert {key: value for key, value in typed.items() if key in expected} == {
        key: value for key, value in expected.items() if key in typed
    }
    assert len(set(typed) & set(expected)) >= 9


@pytest.fixture(scope="module")
def ranks():
    with warm_process():
        yield


def configuration(config):
    """What the backend makes of a resolved config."""
    from miles.backends.megatron_utils.families import read_shape
    from miles.backends.megatron_utils.model import transformer_config

    args = Namespace(**config)
    shape = read_shape(args.hf_config)
    made = transformer_config(args, shape, torch.bfloat16)
    found = {name: getattr(made, name) for name in (*COLUMNS[:9], *SAME_FOR_ALL)}
    found["activation_func"] = made.activation_func.__name__
    scaling = shape.rope.scaling or {}
    return found, (shape.vocab, shape.tied, shape.rope.base, scaling.get("factor"), shape.max_positions)


def configurations(configs):
    return [configuration(config) for config in configs]


@pytest.mark.full
def test_dense_blocks_become_the_configuration_of_their_models(ranks):
    configs = [resolved(block(name), form(DENSE[name])).config for name in DENSE for form in (dict, todays)]
    made = run_ranks(1, configurations, configs, distributed=False)[0]
    for place, name in enumerate(DENSE):
        row = SHAPES[name]
        for found, rest in made[2 * place : 2 * place + 2]:
            assert found == {**dict(zip(COLUMNS[:9], row[:9], strict=True)), **SAME_FOR_ALL}
            assert rest == row[9:]


def experts_of(config):
    from miles.backends.megatron_utils.families import read_shape
    from miles.backends.megatron_utils.model import transformer_config

    args = Namespace(**config)
    made = transformer_config(args, read_shape(args.hf_config), torch.bfloat16)
    return {name: getattr(made, name) for name in EXPERTS}


@pytest.mark.full
def test_a_block_with_experts_becomes_the_configuration_of_its_model(ranks):
    config = resolved(BLOCKS["qwen3-30B-A3B"], WITH_EXPERTS).config
    assert run_ranks(1, experts_of, config, distributed=False)[0] == EXPERTS
