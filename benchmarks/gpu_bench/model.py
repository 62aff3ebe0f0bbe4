"""A random model of Qwen3's shape with a byte tokenizer, and prompts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bench.rehearsal import shape as rehearsal_shape
from main_job_bench.processes import environment, python, run
from main_job_bench.workload import write_tokenizer


@dataclass(frozen=True)
class Shape:
    """Sizes as ``config.json`` names them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    experts: int = 0
    expert_ffn: int = 0
    vocab: int = 151936
    head_dim: int = 128
    tied: bool = True

    def config(self) -> dict[str, object]:
        """As ``config.json`` has it."""
        return self._dense() | (self._experts() if self.experts else {})

    def _experts(self) -> dict[str, object]:
        """Of which each token gets two."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": self.experts,
            "num_experts_per_tok": 2, "moe_intermediate_size": self.expert_ffn, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "router_aux_loss_coef": 0.0, "output_router_logits": False,
            "mlp_only_layers": [], "tie_word_embeddings": False,
        }  # fmt: skip

    def _dense(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "attention_bias": False,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.ffn,
            "vocab_size": self.vocab, "tie_word_embeddings": self.tied, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "max_position_embeddings": 4096, "attention_dropout": 0.0,
            "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256,
            "torch_dtype": "bfloat16", "use_cache": True,
        }  # fmt: skip


SHAPES = {
    "layers8": Shape(hidden=1024, layers=8, heads=16, kv_heads=8, ffn=3072),
    "moe": Shape(hidden=1024, layers=4, heads=16, kv_heads=8, ffn=3072, vocab=32768, experts=8, expert_ffn=768),
    "tiny-moe": Shape(
        hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=320, head_dim=16, experts=4, expert_ffn=48
    ),
    "0.6B": Shape(hidden=1024, layers=28, heads=16, kv_heads=8, ffn=3072),
    "4B": Shape(hidden=2560, layers=36, heads=32, kv_heads=8, ffn=9728),
    "8B": Shape(hidden=4096, layers=36, heads=32, kv_heads=8, ffn=12288, tied=False),
    "tiny": Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=320, head_dim=16),
}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: stages run side by side."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def model(out: Path, name: str, deadline_s: float = 200.0) -> Path:
    """Its directory, made in a process of its own, unless it is there already. A rehearsal gets a tiny one."""
    name = rehearsal_shape(name)
    path = out / f"model-{name}"
    with locked(out / f"model-{name}.lock"):
        if not (path / "tokenizer.json").exists():
            run(
                python("-m", "gpu_bench.model", str(path), name),
                env=environment(8),
                log_path=out / f"model-{name}.log",
                deadline_s=deadline_s,
            )
    return path


def config_only(out: Path, name: str) -> Path:
    """A model's directory without weights."""
    path = out / f"config-{name}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name].config(), indent=1))
    write_tokenizer(path)
    return path


def prompts(out: Path, count: int = 512) -> Path:
    """A JSONL file."""
    path = out / "prompts.jsonl"
    rows = [{"prompt": f"What is {37 * n + 11} plus {53 * n + 29}? ", "label": str(90 * n + 40)} for n in range(count)]
    aside = path.with_suffix(f".{os.getpid()}")  # a run beside this one may be reading it
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)
    return path


def moe_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights of a model with experts, as published models have them: expert by expert."""
    hidden = shape.hidden
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (hidden,)
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{name}.weight", (shape.head_dim,)
        yield prefix + "mlp.gate.weight", (shape.experts, hidden)
        for expert in range(shape.experts):
            for name in ("gate", "up", "down"):
                sizes = (shape.expert_ffn, hidden)
                yield f"{prefix}mlp.experts.{expert}.{name}_proj.weight", sizes[::-1] if name == "down" else sizes
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab, hidden)


def write_moe(path: Path, shape: Shape) -> None:
    """Random weights of a model with experts: versions of transformers differ in how they name them when they save."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.ones(sizes) if name.endswith("norm.weight") else 0.02 * torch.randn(sizes, generator=generator))
        for name, sizes in moe_shapes(shape)
    }
    bfloat16 = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(bfloat16, path / "model.safetensors", metadata={"format": "pt"})


def main(argv: list[str]) -> int:
    import torch
    import transformers

    qwen3: Any = transformers
    path, shape = Path(argv[0]), SHAPES[argv[1]]
    config = shape.config()
    torch.manual_seed(0)
    path.mkdir(parents=True, exist_ok=True)
    if shape.experts:
        write_moe(path, shape)
    else:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config(**config)).to(torch.bfloat16)
        made.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
