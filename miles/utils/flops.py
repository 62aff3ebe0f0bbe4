"""How much computing a sequence is, from the model's sizes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.utils.lora import LoraSettings


def forward_flops(hf_config: Mapping[str, Any], length: float) -> float:
    """Floating-point operations of one forward pass over a sequence of ``length`` tokens: two per weight and token, and
    attention's two products with a causal mask.

    Args:
        hf_config: A model's ``config.json``; of a mixture of experts, what each token passes through is counted.
        length: Tokens.
    """
    per_token, per_square = flops_factors(hf_config)
    return per_token * length + per_square * length**2


def training_flops(hf_config: Mapping[str, Any], length: float, lora: LoraSettings | None = None) -> float:
    """Of a forward and a backward pass. A gradient of an input, and one of a weight, cost as much as the product they
    belong to; a weight below an adapter is frozen, and has no gradient of its own. What is computed again in the
    backward pass is not counted."""
    per_token, per_square = flops_factors(hf_config)
    passes = 3.0 if lora is None else 2.0
    trained = 3.0 * adapter_flops(hf_config, lora) if lora is not None else 0.0
    return (passes * per_token + trained) * length + 3.0 * per_square * length**2


def adapter_flops(hf_config: Mapping[str, Any], lora: LoraSettings) -> float:
    """What adapters add to a forward pass, per token: two per number of ``A`` and ``B``, a shared ``A`` once."""
    config = hf_config.get("text_config") or hf_config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    queries, keys = (hidden, heads * head), (hidden, groups * head)
    attention = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries[::-1]}
    layers, active = config["num_hidden_layers"], config.get("num_experts_per_tok") or 0
    dense = _dense_layers(config) if active else layers
    widths = [
        (layers, attention),
        (dense, _mlp_widths(hidden, config.get("intermediate_size") or 0)),
        ((layers - dense) * active, _mlp_widths(hidden, config.get("moe_intermediate_size") or 0)),
    ]
    numbers: int = sum(count * lora.rank * _adapter_rows(of_layer, lora) for count, of_layer in widths)
    return 2.0 * numbers


def _mlp_widths(hidden: int, ffn: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden)}


def _adapter_rows(widths: Mapping[str, tuple[int, int]], lora: LoraSettings) -> int:
    """Numbers in the adapters of layers of these widths (in, out), per rank."""
    targets = [name for name in widths if name in lora.targets]
    inputs = {lora.sharer(f".{name}"): widths[name][0] for name in targets}
    return sum(inputs.values()) + sum(widths[name][1] for name in targets)


def sample_costs(args: Any, lengths: npt.NDArray[np.int64] | Sequence[int]) -> list[float]:
    """FLOPs of a forward pass over each sample, for ``--balance-by-flops``."""
    per_token, per_square = flops_factors(args.hf_config)
    tokens = np.asarray(lengths, np.float64)
    costs: list[float] = (per_token * tokens + per_square * tokens**2).tolist()
    return costs


def flops_factors(hf_config: Mapping[str, Any]) -> tuple[float, float]:
    """What a forward pass takes per token, and per square of the sequence's length."""
    config = hf_config.get("text_config") or hf_config  # of a model that also sees
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    attention_weights, score_width = _attention(config)
    dense, expert = _feed_forward(config)
    sparse_layers = layers - _dense_layers(config) if expert else 0
    weights = layers * attention_weights + (layers - sparse_layers) * dense + sparse_layers * expert
    weights += hidden * config["vocab_size"]
    return 2.0 * weights, float(layers * score_width)


def _attention(config: Mapping[str, Any]) -> tuple[int, int]:
    """Weights of a layer's projections, and the widths of its two products over all heads.

    Half of a product's multiplications are masked, and each is two operations.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if latent := config.get("kv_lora_rank"):  # multi-head latent attention
        rotated, plain, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
        query = heads * (plain + rotated)
        query_latent = config.get("q_lora_rank")
        query_weights = query_latent * (hidden + query) if query_latent else hidden * query
        kv_weights = hidden * (latent + rotated) + latent * heads * (plain + value)
        return query_weights + kv_weights + heads * value * hidden, query + heads * value
    head = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    return hidden * head * (2 * heads + 2 * groups), 2 * heads * head


def _feed_forward(config: Mapping[str, Any]) -> tuple[int, int]:
    """Weights that a token passes through in a dense layer, and in one with experts (0: there is none)."""
    hidden = config["hidden_size"]
    dense = 3 * hidden * (config.get("intermediate_size") or 0)
    active = config.get("num_experts_per_tok")
    if not active:
        return dense, 0
    width = config.get("moe_intermediate_size") or config.get("intermediate_size") or 0
    shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
    num_experts = config.get("num_experts") or config.get("n_routed_experts") or config.get("num_local_experts") or 0
    return dense, 3 * hidden * (width * active + shared) + hidden * num_experts


def _dense_layers(config: Mapping[str, Any]) -> int:
    """Layers without experts in a model that has some."""
    layers: int = config["num_hidden_layers"]
    dense = set(range(config.get("first_k_dense_replace") or 0)) | set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step") or 1
    dense |= {layer for layer in range(layers) if (layer + 1) % step}
    return len(dense & set(range(layers)))
