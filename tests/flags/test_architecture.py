"""The model's shape: derived from config.json, compared with what was typed."""

import pytest
from support.flag_cases import FACTS, LLAMA, MODEL, QWEN2, QWEN3, config, outcome, problems, with_directory, with_model

from miles.flags.architecture import EXPERTS, UnknownArchitecture, named_family, rope_parameters, shape
from miles.flags.layer_pattern import layer_pattern

BLOCKS = {
    "qwen2.5-0.5B": (
        QWEN2,
        "--swiglu --num-layers 24 --hidden-size 896 --ffn-hidden-size 4864 --num-attention-heads 14 "
        "--use-rotary-position-embeddings --disable-bias-linear --add-qkv-bias --normalization RMSNorm "
        "--norm-epsilon 1e-6 --rotary-base 1000000 --group-query-attention --num-query-groups 2 --vocab-size 151936",
        {"qk_layernorm": False, "kv_channels": 64, "untie_embeddings_and_output_weights": False},
    ),
    "qwen3-0.6B": (
        QWEN3,
        "--swiglu --num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072 --num-attention-heads 16 "
        "--group-query-attention --num-query-groups 8 --use-rotary-position-embeddings --disable-bias-linear "
        "--normalization RMSNorm --norm-epsilon 1e-6 --rotary-base 1000000 --vocab-size 151936 --kv-channels 128 "
        "--qk-layernorm",
        {"add_qkv_bias": False, "untie_embeddings_and_output_weights": False, "use_rope_scaling": False},
    ),
    "llama3.1-8B-Instruct": (
        LLAMA,
        "--swiglu --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
        "--group-query-attention --num-query-groups 8 --max-position-embeddings 131072 "
        "--use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-5 "
        "--rotary-base 500000 --vocab-size 128256 --kv-channels 128 --use-rope-scaling --rotary-scaling-factor 8.0 "
        "--untie-embeddings-and-output-weights",
        {"add_qkv_bias": False, "qk_layernorm": False, "rope_scaling_factor": 8.0},
    ),
}


def facts_of(model):
    return with_directory("M", type(MODEL)(exists=True, config=model, has_tokenizer=True, has_weights=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of_published_recipes_agree_with_their_models(name):
    model, block, derived = BLOCKS[name]
    facts = facts_of(model)
    typed, untyped = config(block, facts=facts), config(facts=facts)
    fields = shape(model)
    assert {key: typed[key] for key in fields} == {key: untyped[key] for key in fields} == fields
    assert {key: typed[key] for key in derived} == derived


def test_the_shape_of_qwen3():
    assert shape(QWEN3) == {
        "num_layers": 28,
        "hidden_size": 1024,
        "ffn_hidden_size": 3072,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "group_query_attention": True,
        "kv_channels": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": 1000000,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "rope_scaling_factor": None,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": False,
        **dict.fromkeys(EXPERTS),
    }


def test_experts_are_in_the_layers_that_the_config_says():
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 6}
    config = QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"]} | experts
    assert shape(config)["moe_layer_freq"] == [1] * 6
    found = shape(config | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True})
    assert {name: found[name] for name in EXPERTS} == {
        "num_experts": 8,
        "moe_ffn_hidden_size": 64,
        "moe_router_topk": 2,
        "moe_layer_freq": [0, 1, 0, 0, 0, 1],
        "moe_router_pre_softmax": False,
    }


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("1", [1, 1, 1, 1]),
        ("2", [1, 0, 1, 0]),
        ("[0,1, 1,1]", [0, 1, 1, 1]),
        ("[0]*1+[1]*3", [0, 1, 1, 1]),
        ("([0]+[1])*2", [0, 1, 0, 1]),
    ],
)
def test_which_layers_have_experts_can_be_said_in_several_ways(text, pattern):
    assert layer_pattern(text, 4) == pattern


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "[2]", "[[1]]", "x", "[1]*10**9", "[1]*999999", "f()", "(" * 500, "True"]
)
def test_what_is_no_pattern_of_layers_is_told(text):
    with pytest.raises(ValueError, match="neither a number nor a list"):
        layer_pattern(text, 4)


def test_all_disagreements_are_told_at_once():
    wrong = "--num-layers 24 --hidden-size 896 --norm-epsilon 1e-5 --add-qkv-bias --rotary-base 10000 --vocab-size 1"
    found = problems(wrong)
    assert set(found) == {
        "--num-layers",
        "--hidden-size",
        "--norm-epsilon",
        "--add-qkv-bias",
        "--rotary-base",
        "--vocab-size",
    }
    assert "config.json of --hf-checkpoint says otherwise: 28" in found["--num-layers"]


def test_the_config_holds_what_the_model_says_and_its_config_json():
    resolved = outcome("--num-layers 24")
    assert resolved.config["num_layers"] == 28
    assert resolved.config["hf_config"] == QWEN3


def test_grouped_queries_of_one_head_each_are_no_disagreement():
    assert config("--group-query-attention", facts=with_model(num_key_value_heads=16))["num_query_groups"] == 16


def test_todays_and_the_older_spelling_of_rotary_parameters():
    today = {**QWEN3, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    del today["rope_theta"], today["rope_scaling"]
    assert shape(today)["rotary_base"] == 500000
    assert rope_parameters({"rope_scaling": {"type": "llama3", "factor": 8.0}})["rope_type"] == "llama3"


def test_a_theta_that_is_no_whole_number_stays_one():
    assert shape({**QWEN3, "rope_theta": 10000.5})["rotary_base"] == 10000.5


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rotary scaling of type yarn"),
        ({"use_sliding_window": True}, "a sliding window"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"attention_bias": True}, "biases in attention"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change, name):
    found = problems(facts=with_model(**change))
    assert name in found["--hf-checkpoint"]
    assert "not built yet" in found["--hf-checkpoint"]


def test_a_model_without_architectures_is_known_by_its_type():
    assert shape({key: value for key, value in QWEN3.items() if key != "architectures"})["qk_layernorm"] is True
    with pytest.raises(UnknownArchitecture, match="without a name"):
        shape({"hidden_size": 1})


def test_a_config_without_a_needed_field_names_it():
    assert "'hidden_size'" in problems(facts=with_model(hidden_size=None))["--hf-checkpoint"]


@pytest.mark.parametrize(("size", "flag"), [(3, "attention heads"), (16, "key-value heads")])
def test_tensor_parallel_divides_heads(size, flag):
    flags = f"--tensor-model-parallel-size {size} --actor-num-gpus-per-node {size}"
    assert flag in problems(flags)["--tensor-model-parallel-size"]


def test_facts_without_a_model_have_no_shape():
    found = problems(without=["--hf-checkpoint"], facts=FACTS)
    assert "it is missing" in found["--hf-checkpoint"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3", "qwen3"),
        ("Qwen3-4B", "qwen3"),
        ("qwen3config", "qwen3"),
        ("qwen2.5-0.5B-Instruct", "qwen2"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("llama3.1-8B-Instruct", "llama"),
        ("llama", "llama"),
        ("qwen3-30B-A3B", "qwen3_moe"),
        ("qwen3_moe", "qwen3_moe"),
        ("qwen3-235B-A22B-Thinking-2507", "qwen3_moe"),
        ("qwen3-next-80B-A3B", None),
        ("qwen3.5-4B", None),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Qwen3MoeConfig", "qwen3_moe"),
        ("llama4", None),
        ("deepseekv3", None),
    ],
)
def test_families_by_name(name, kind):
    assert named_family(name) == kind


def test_a_models_name_gives_the_family_of_an_architecture_that_is_unknown():
    unknown = with_model(architectures=["MyForCausalLM"], model_type="mine")
    resolved = outcome("--model-name qwen3-4B", facts=unknown)
    assert resolved.problems == ()
    assert resolved.config["hf_config"]["model_type"] == "qwen3"
    assert resolved.config["qk_layernorm"] is True
    assert any("taken for one of qwen3" in notice for notice in resolved.notices)
    assert "MyForCausalLM" in problems(facts=unknown)["--hf-checkpoint"]


def test_a_models_name_that_fits_changes_nothing():
    assert config("--model-name Qwen3-0.6B")["hf_config"] == QWEN3


def test_an_unknown_name_lists_the_families_and_another_one_is_told():
    assert "qwen2, qwen3, qwen3_moe, llama or mimo" in problems("--model-name deepseek-v3")["--model-name"]
    assert "of the family qwen3" in problems("--model-name qwen2.5-7B")["--model-name"]
