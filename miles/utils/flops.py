"""How much computing a sequence is, from the model's sizes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def forward_flops(hf_config: dict[str, Any], length: float) -> float:
    """Floating-point operations of one forward pass over a sequence of ``length`` tokens; training takes three times
    as many. Two per weight and token, and attention's two products with a causal mask.

    Args:
        hf_config: A dense model's ``config.json``; of a mixture of experts, what each token passes through is counted.
        length: Tokens.
    """
    hidden = hf_config["hidden_size"]
    heads = hf_config["num_attention_heads"]
    head_dim = hf_config.get("head_dim") or hidden // heads
    groups = hf_config.get("num_key_value_heads") or heads
    experts = hf_config.get("num_experts_per_tok")
    ffn = hf_config.get("moe_intermediate_size") if experts else hf_config["intermediate_size"]
    attention_weights = hidden * head_dim * (2 * heads + 2 * groups)
    per_layer = attention_weights + 3 * hidden * (ffn or 0) * (experts or 1)
    weights = hf_config["num_hidden_layers"] * per_layer + hidden * hf_config["vocab_size"]
    scores = hf_config["num_hidden_layers"] * heads * head_dim * length**2
    return float(2 * weights * length + 2 * scores)


def sample_costs(args: Any, lengths: npt.NDArray[np.int64] | Sequence[int]) -> list[float]:
    """FLOPs of a forward pass over each sample, for ``--balance-by-flops``."""
    return [forward_flops(args.hf_config, float(length)) for length in lengths]
