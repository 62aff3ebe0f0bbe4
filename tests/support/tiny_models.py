"""Random tiny models as Hugging Face directories: Qwen2, Qwen3, Qwen3-MoE, Llama, with a tokenizer and a chat template.

The same arguments give the same bytes. Made once per process and arguments, below a directory that goes at its end;
treat a directory as read-only. Imports neither transformers nor megatron.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ARCHITECTURES = ("qwen2", "qwen3", "llama")
MOE = "qwen3_moe"
MIMO = "mimo"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, IM_START_ID, IM_END_ID = 256, 257, 258
"""Ids 0 to 255 stand for the bytes of UTF-8 (in the order of their symbols); these follow."""
MIN_VOCAB = 256 + len(SPECIALS)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tiny_model(
    architecture: str = "qwen3",
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int | None = None,
    vocab: int = 320,
    tied: bool = True,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    rope_scaling: str | None = None,
    mlp_only_layers: tuple[int, ...] = (),
    mtp_layers: int = 1,
    seed: int = 0,
) -> Path:
    """A directory that ``AutoModelForCausalLM``, ``AutoTokenizer`` and SGLang load.

    Args:
        architecture: One of ``ARCHITECTURES``, or ``MOE``: four experts of which two are chosen; or ``MIMO``, which
            transformers does not know.
        head_dim: Qwen3 and Llama only; default ``hidden // heads``.
        vocab: Rows of the embedding, at least ``MIN_VOCAB``; ids from there on are never produced by the tokenizer.
        shards: Weight files; more than one come with ``model.safetensors.index.json``.
        rope_scaling: "llama3": Llama 3.1's, small enough to show at a few dozen positions.
        mlp_only_layers: Of ``MOE``: layers without experts.
        mtp_layers: Of ``MIMO``: layers that predict further tokens.
    """
    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab must be at least {MIN_VOCAB}")
    config = _config(architecture, hidden, layers, heads, kv_heads, head_dim, ffn or 2 * hidden, vocab, tied, dtype)
    if rope_scaling is not None:
        config["rope_scaling"] = _LLAMA3_ROPE
    if architecture == MOE:
        config |= _EXPERTS | {"mlp_only_layers": list(mlp_only_layers)}
    if architecture == MIMO:
        config["num_nextn_predict_layers"] = mtp_layers
    path = Path(tempfile.mkdtemp(prefix=f"{architecture}-", dir=_base()))
    write_model(path, config, shards=shards, seed=seed, dtype=dtype)
    write_tokenizer(path)
    return path


def write_model(path: Path, config: dict, *, shards: int, seed: int, dtype: torch.dtype) -> None:
    """``config.json`` and random weights for it."""
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, generator).to(dtype) for name, shape in tensor_shapes(config)}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    size = math.ceil(len(names) / shards)
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index * size : (index + 1) * size]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(path: Path) -> None:
    """One token per byte and three specials, with a chat template of the ChatML kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    generation = {"eos_token_id": [IM_END_ID], "pad_token_id": PAD_ID}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))


def tensor_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights that a ``config.json`` of these architectures asks for."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (vocab, hidden)
    prefixes = [f"model.layers.{layer}." for layer in range(config["num_hidden_layers"])]
    further = [f"model.mtp_layers.{layer}." for layer in range(config.get("num_nextn_predict_layers", 0))]
    for prefix in further:
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            yield f"{prefix}{name}.weight", (hidden,)
        yield prefix + "input_proj.weight", (hidden, 2 * hidden)
    for layer, prefix in enumerate([*prefixes, *further]):
        yield prefix + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            if config["model_type"] in ("qwen2", MIMO):
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        if config["model_type"] in ("qwen3", MOE):
            yield prefix + "self_attn.q_norm.weight", (head_dim,)
            yield prefix + "self_attn.k_norm.weight", (head_dim,)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if config["model_type"] == MOE and layer not in config["mlp_only_layers"]:
            yield prefix + "mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from _mlp_shapes(f"{prefix}mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp_shapes(prefix + "mlp.", hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (ffn, hidden)
    yield prefix + "up_proj.weight", (ffn, hidden)
    yield prefix + "down_proj.weight", (hidden, ffn)


_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": 0.0,
    "output_router_logits": False,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _config(architecture, hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied, dtype) -> dict:
    names = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        MOE: "Qwen3MoeForCausalLM",
        MIMO: "MiMoForCausalLM",
        "llama": "LlamaForCausalLM",
    }
    config = {
        "architectures": [names[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6 if architecture != "llama" else 1e-5,
        "rope_theta": 1000000.0 if architecture != "llama" else 500000.0,
        "max_position_embeddings": 512,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": IM_END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if architecture != "qwen2":
        config["head_dim"] = head_dim or hidden // heads
        config["attention_bias"] = False
    elif head_dim is not None:
        raise ValueError("qwen2 has no head_dim")
    if architecture == "llama":
        config["mlp_bias"] = False
    return config


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Large enough that every weight shows in the logits: errors must not drown in noise."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * values
    return values * (0.5 if len(shape) == 1 else 1.5 / math.sqrt(shape[1]))


@functools.cache
def _base() -> str:
    path = tempfile.mkdtemp(prefix="tiny-models-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
