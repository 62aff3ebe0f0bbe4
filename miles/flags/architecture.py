"""The shape of a model in Megatron's words, from its ``config.json``. Pure.

Sources: the configuration classes of Qwen2, Qwen3, Qwen3-MoE and Llama in transformers (names and defaults of
fields), MiMo's published ``config.json``, and the argument names of Megatron-LM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
    "MiMoForCausalLM": "mimo",
}
"""Architectures that are built, and their ``model_type``."""

_NAMES = {
    "qwen2": r"qwen2(\.5)?",
    "qwen3_moe": r"qwen3([-_]?moe|[-_]\d+b[-_]a\d+b)",
    "qwen3": r"qwen3",
    "llama": r"llama([23](\.\d)?)?",
    "mimo": r"mimo(?!-v2)",
}
_MORE = r"(config|forcausallm|[-_]((?!a\d+b|moe|vl|omni|next)[a-z0-9.]+))*"
"""What may follow a family's name: sizes and variants, but none that is a family of its own."""


def named_family(name: str) -> str | None:
    """The family that ``--model-name`` names, by itself (``qwen3``) or as a model (``Qwen3-4B``); None: none."""
    for kind, pattern in _NAMES.items():
        if re.fullmatch(pattern + _MORE, name.lower()):
            return kind
    return None


class UnknownArchitecture(ValueError):
    """A model that no table here describes; the message says which."""


def family(config: Mapping[str, Any]) -> str:
    """``qwen2``, ``qwen3``, ``qwen3_moe``, ``llama`` or ``mimo``.

    Raises:
        UnknownArchitecture: It is another one.
    """
    names = config.get("architectures") or []
    known = [FAMILIES[name] for name in names if name in FAMILIES]
    if known:
        return known[0]
    model_type = config.get("model_type")
    if not names and model_type in FAMILIES.values():
        return str(model_type)
    raise UnknownArchitecture(f"architecture {' '.join(map(str, names)) or model_type or 'without a name'}")


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of Megatron's shape flags, by dest.

    Raises:
        UnknownArchitecture: The model is of a family, or has a feature, that is not built.
        KeyError: ``config.json`` lacks a field without a default; the argument is its name.
    """
    kind = family(config)
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    _refuse_features(kind, config)
    return {
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": int(config["hidden_size"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "group_query_attention": groups != heads,
        "kv_channels": _head_width(kind, config, heads),
        "vocab_size": int(config["vocab_size"]),
        "max_position_embeddings": int(config.get("max_position_embeddings") or _CONTEXT[kind]),
        "normalization": "RMSNorm",
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        **_rotary(config),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": kind in _QKV_BIAS,
        "qk_layernorm": kind in {"qwen3", "qwen3_moe"},
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        **(_experts(config) if kind == "qwen3_moe" else dict.fromkeys(EXPERTS)),
    }


EXPERTS = ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_layer_freq", "moe_router_pre_softmax")
"""Flags of a mixture of experts; None for a model without one."""


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Experts in every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``. A router that does not
    normalise what it chose (``norm_topk_prob``) takes the softmax over all experts, before it chooses."""
    step, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or [])
    layers = range(int(config["num_hidden_layers"]))
    values = (
        int(config["num_experts"]),
        int(config["moe_intermediate_size"]),
        int(config["num_experts_per_tok"]),
        [int(layer not in dense and (layer + 1) % step == 0) for layer in layers],
        not config.get("norm_topk_prob", False),
    )
    return dict(zip(EXPERTS, values, strict=True))


_CONTEXT = {"qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768, "llama": 2048, "mimo": 32768}
_QKV_BIAS = ("qwen2", "mimo")


def _head_width(kind: str, config: Mapping[str, Any], heads: int) -> int:
    width = config.get("head_dim")
    if width is None:
        width = 128 if kind == "qwen3" else int(config["hidden_size"]) // heads
    return int(width)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = rope_parameters(config)
    base = scaling.get("rope_theta") or config.get("rope_theta") or 10000
    is_scaled = scaling.get("rope_type") == "llama3"
    return {
        "rotary_base": int(base) if float(base).is_integer() else float(base),
        "rotary_percent": 1.0,
        "use_rope_scaling": is_scaled,
        "rope_scaling_factor": float(scaling["factor"]) if is_scaled else None,
    }


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the rotary embedding, from today's ``rope_parameters`` or the older ``rope_scaling``, with ``rope_type``."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.pop("type", None) or "default")
    return found


def _refuse_features(kind: str, config: Mapping[str, Any]) -> None:
    rope = rope_parameters(config)
    absent = {
        "rotary scaling of type " + str(rope["rope_type"]): rope["rope_type"] not in {"default", "llama3"},
        "a sliding window": bool(config.get("use_sliding_window")),
        f"activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "biases in attention": kind not in _QKV_BIAS and bool(config.get("attention_bias")),
        "biases in the MLP": bool(config.get("mlp_bias")),
        "a partial rotary embedding": (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1)
        != 1,
        "quantised weights": bool(config.get("quantization_config")),
    }
    if refused := [name for name, present in absent.items() if present]:
        raise UnknownArchitecture(f"{kind} with {', '.join(refused)}")
