"""Architecture families: what a Hugging Face ``config.json`` means for Megatron, and which tensor goes where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from miles.backends.hf_directory import MTP_LAYERS
from miles.backends.megatron_utils.errors import UnsupportedModel
from miles.backends.megatron_utils.weight_layouts import (
    Cut,
    FusedQKV,
    GateAndUp,
    Layout,
    Replicated,
    SwappedHalves,
    Vocabulary,
)


@dataclass(frozen=True)
class Family:
    """What tells one family of decoder-only models from another. ``has_mtp``: layers that predict further tokens,
    as many as ``num_nextn_predict_layers`` says."""

    qkv_bias: bool
    qk_norm: bool
    has_experts: bool = False
    has_mtp: bool = False


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(qkv_bias=True, qk_norm=False),
    "qwen3": Family(qkv_bias=False, qk_norm=True),
    "qwen3_moe": Family(qkv_bias=False, qk_norm=True, has_experts=True),
    "llama": Family(qkv_bias=False, qk_norm=False),
    "mimo": Family(qkv_bias=True, qk_norm=False, has_mtp=True),
}
"""By ``model_type``."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and how the frequencies are scaled (``llama3``, or not at all)."""

    base: float
    scaling: Mapping[str, float] | None = None

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """float32 ``[head_dim / 2]``. Scaling: "Llama 3.1" as in Hugging Face's ``rope_type: llama3``."""
        frequencies = 1.0 / (self.base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.scaling is None:
            return frequencies
        factor, low, high = (self.scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = self.scaling["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
        # Short wavelengths stay, long ones are stretched by the factor, those between go from one to the other.
        return (1 - smooth) * frequencies / factor + smooth * frequencies


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP of some layers.

    Attributes:
        count: Experts of a layer.
        per_token: How many of them each token is given to.
        ffn: Width of one.
        normalised: Weights of the chosen experts add up to 1.
        layers: Which layers have experts.
    """

    count: int
    per_token: int
    ffn: int
    normalised: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A model as its ``config.json`` describes it. ``mtp_layers``: those that predict further tokens."""

    model_type: str
    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norm_eps: float
    rope: Rope
    max_positions: int
    experts: Experts | None = None
    mtp_layers: int = 0


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Of a ``config.json``.

    Raises:
        UnsupportedModel: Another architecture, or a variant of a known one that the layers here do not compute.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(
            f"the Megatron backend does not know models of type {model_type!r}",
            evidence=f"architectures: {config.get('architectures')}; known: {', '.join(FAMILIES)}",
            advice="Use a model of a known type, or --train-backend fsdp.",
            model_type=model_type,
        )
    _refuse_variants(config, model_type, family)
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return Shape(
        model_type=model_type,
        family=family,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        ffn=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        # What transformers takes where config.json is silent.
        head_dim=int(config.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads)),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config),
        max_positions=int(config.get("max_position_embeddings", 32768)),
        experts=_read_experts(config) if family.has_experts else None,
        mtp_layers=int(config.get("num_nextn_predict_layers") or 0) if family.has_mtp else 0,
    )


def _read_experts(config: Mapping[str, Any]) -> Experts:
    """Of Qwen3-MoE: experts in every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``."""
    step, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or [])
    count = int(config["num_experts"])
    layers = range(int(config["num_hidden_layers"]))
    return Experts(
        count=count,
        per_token=int(config["num_experts_per_tok"]),
        ffn=int(config["moe_intermediate_size"]),
        normalised=bool(config.get("norm_topk_prob", False)),
        layers=tuple(i for i in layers if i not in dense and count and (i + 1) % step == 0),
    )


def _refuse_variants(config: Mapping[str, Any], model_type: str, family: Family) -> None:
    wrong = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")) and not family.qkv_bias,
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "quantization_config": bool(config.get("quantization_config")),
    }
    for key, refused in wrong.items():
        if refused:
            raise UnsupportedModel(
                f"the Megatron backend cannot compute this variant of {model_type}",
                evidence=f"config.json says {key}: {config[key]!r}",
                advice="Use a model without it, or --train-backend fsdp.",
                model_type=model_type,
            )


def _read_rope(config: Mapping[str, Any]) -> Rope:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return Rope(base)
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Rope(base, {key: float(parameters[key]) for key in keys})
    raise UnsupportedModel(
        f"the Megatron backend cannot scale rotary embeddings by {kind!r}",
        evidence=f"config.json says {parameters!r}; known: default, llama3",
        advice="Use a model without it, or --train-backend fsdp.",
    )


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter, and the Hugging Face tensors that it is made of, by name, with their shapes.

    ``layer`` and ``expert`` count over all pipeline stages and all ranks; a model on one rank has the same names with
    its own numbers (``stages.Stage``).
    """

    megatron: str
    hf: Mapping[str, tuple[int, ...]]
    layout: Layout
    layer: int | None = None
    expert: int | None = None


def weight_rules(shape: Shape, padded_vocab: int) -> list[Rule]:
    """All parameters of a model, in the order in which weights are handed on."""
    vocabulary, rows = Vocabulary(shape.vocab, padded_vocab), (shape.vocab, shape.hidden)
    rules = [Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": rows}, vocabulary)]
    for layer in range(shape.layers):
        own = _layer_rules(shape, layer, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        rules += [replace(rule, layer=layer) for rule in own]
    rules.append(Rule("decoder.final_layernorm.weight", {"model.norm.weight": (shape.hidden,)}, Replicated()))
    if not shape.tied:
        rules.append(Rule("output_layer.weight", {"lm_head.weight": rows}, vocabulary))
    for number in range(shape.mtp_layers):
        rules += _mtp_rules(shape, f"mtp.layers.{number}.", f"{MTP_LAYERS}{number}.")
    return rules


def _mtp_rules(shape: Shape, ours: str, theirs: str) -> list[Rule]:
    """Of a layer that predicts further tokens, as MiMo names it: a decoder layer, and what leads to it and from it."""
    hidden = shape.hidden
    norms = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "final_layernorm": "final_layernorm"}
    # Theirs is of [hidden state, embedding], ours of [embedding, hidden state].
    projection = {theirs + "input_proj.weight": (hidden, 2 * hidden)}
    return [
        *(
            Rule(f"{ours}{own}.weight", {f"{theirs}{its}.weight": (hidden,)}, Replicated())
            for own, its in norms.items()
        ),
        Rule(ours + "eh_proj.weight", projection, SwappedHalves()),
        *_layer_rules(shape, shape.layers, ours + "transformer_layer.", theirs),
    ]


def _layer_rules(shape: Shape, layer: int, ours: str, theirs: str) -> list[Rule]:
    hidden, queries = shape.hidden, shape.heads * shape.head_dim
    attention, hf_attention = ours + "self_attention.", theirs + "self_attn."
    mlp, hf_mlp = ours + "mlp.", theirs + "mlp."
    has_experts = shape.experts is not None and layer in shape.experts.layers
    return [
        Rule(ours + "input_layernorm.weight", {theirs + "input_layernorm.weight": (hidden,)}, Replicated()),
        *_attention_rules(shape, attention, hf_attention),
        Rule(
            ours + "self_attention.linear_proj.weight", {theirs + "self_attn.o_proj.weight": (hidden, queries)}, Cut(1)
        ),
        Rule(ours + "pre_mlp_layernorm.weight", {theirs + "post_attention_layernorm.weight": (hidden,)}, Replicated()),
        *(_expert_rules(shape, mlp, hf_mlp) if has_experts else _mlp_rules(shape.hidden, shape.ffn, mlp, hf_mlp)),
    ]


def _mlp_rules(hidden: int, ffn: int, ours: str, theirs: str, *, expert: int | None = None) -> list[Rule]:
    gate_and_up = {f"{theirs}{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
    return [
        Rule(ours + "linear_fc1.weight", gate_and_up, GateAndUp(), expert=expert),
        Rule(ours + "linear_fc2.weight", {theirs + "down_proj.weight": (hidden, ffn)}, Cut(1), expert=expert),
    ]


def _expert_rules(shape: Shape, ours: str, theirs: str) -> list[Rule]:
    experts = shape.experts
    assert experts is not None
    rules = [Rule(ours + "router.weight", {theirs + "gate.weight": (experts.count, shape.hidden)}, Replicated())]
    for number in range(experts.count):
        local, theirs_too = f"{ours}experts.local_experts.{number}.", f"{theirs}experts.{number}."
        rules += _mlp_rules(shape.hidden, experts.ffn, local, theirs_too, expert=number)
    return rules


def _attention_rules(shape: Shape, ours: str, theirs: str) -> list[Rule]:
    rows = {
        "q": shape.heads * shape.head_dim,
        "k": shape.kv_heads * shape.head_dim,
        "v": shape.kv_heads * shape.head_dim,
    }
    layout = FusedQKV(shape.heads, shape.kv_heads, shape.head_dim)
    weights = {f"{theirs}{part}_proj.weight": (count, shape.hidden) for part, count in rows.items()}
    rules = [Rule(ours + "linear_qkv.weight", weights, layout)]
    if shape.family.qkv_bias:
        biases = {f"{theirs}{part}_proj.bias": (count,) for part, count in rows.items()}
        rules.append(Rule(ours + "linear_qkv.bias", biases, layout))
    if shape.family.qk_norm:
        rules += [
            Rule(f"{ours}{part}_layernorm.weight", {f"{theirs}{part}_norm.weight": (shape.head_dim,)}, Replicated())
            for part in "qk"
        ]
    return rules
