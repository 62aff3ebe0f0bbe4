"""Writes what both sides read: a random model with tokenizer, and prompts with the lengths of their answers.

``python -m main_job_bench.workload DIRECTORY SIZE`` with JSON of ``Size``; a process of its own, so that the benchmark
itself needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from main_job_bench.sizes import Model, Size, answer_lengths

SPECIALS = ("<|endoftext|>", "<|im_end|>")
PAD_ID, EOS_ID = 256, 257
MODEL_DIR, PROMPTS = "model", "prompts.jsonl"


def main(argv: list[str]) -> int:
    directory, size = Path(argv[0]), Size.from_json(json.loads(argv[1]))
    path = directory / MODEL_DIR
    path.mkdir(parents=True)
    write_model(path, size.model)
    write_tokenizer(path)
    rows = prompt_rows(size)
    (directory / PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def prompt_rows(size: Size) -> list[dict[str, Any]]:
    """One row for each prompt, in the order in which they are used; each occurs once."""
    rows = []
    for number, lengths in enumerate(answer_lengths(size)):
        question = f"Question {number:03d}: what is {37 * number + 11} plus {53 * number + 29}? "
        rows.append(
            {"prompt": question, "label": str(90 * number + 40), "metadata": {"number": number, "lengths": lengths}}
        )
    return rows


def write_model(path: Path, model: Model) -> None:
    """``config.json``, ``generation_config.json`` and random float32 weights, all as transformers writes them."""
    import torch
    import transformers

    torch.manual_seed(0)
    qwen3: Any = transformers
    config = qwen3.Qwen3Config(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        dtype="float32",
    )
    made = qwen3.Qwen3ForCausalLM(config)
    assert sum(weight.numel() for weight in made.parameters()) == model.num_parameters
    made.generation_config.eos_token_id = EOS_ID
    made.generation_config.pad_token_id = PAD_ID
    made.save_pretrained(path)


def write_tokenizer(path: Path) -> None:
    """One token for each byte, and the specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
