"""A random model of Qwen3's shape with a byte tokenizer, and prompts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    vocab: int = 151936
    head_dim: int = 128
    tied: bool = True

    def config(self) -> dict[str, object]:
        """As ``config.json`` has it."""
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
    "0.6B": Shape(hidden=1024, layers=28, heads=16, kv_heads=8, ffn=3072),
    "4B": Shape(hidden=2560, layers=36, heads=32, kv_heads=8, ffn=9728),
    "8B": Shape(hidden=4096, layers=36, heads=32, kv_heads=8, ffn=12288, tied=False),
    "tiny": Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=320, head_dim=16),
}


def model(out: Path, name: str, deadline_s: float = 200.0) -> Path:
    """Its directory, made in a process of its own, unless it is there already."""
    path = out / f"model-{name}"
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
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(argv: list[str]) -> int:
    import torch
    import transformers

    qwen3: Any = transformers
    path, shape = Path(argv[0]), SHAPES[argv[1]]
    config = shape.config()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config(**config)).to(torch.bfloat16)
    path.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
