"""Make what the demo trains: a small Qwen3 model with random weights, its tokenizer, and sums to add.

    python examples/arithmetic/prepare.py OUT_DIR [--seed 0]

OUT_DIR/model            Hugging Face directory: config, weights, tokenizer, chat template
OUT_DIR/sft.jsonl        conversations for supervised fine-tuning (column "messages")
OUT_DIR/train.jsonl      sums to learn from, with answers (columns "prompt" and "label")
OUT_DIR/heldout.jsonl    sums that are in neither of the others, nor turned around

The warm-up teaches two ways to answer. Most conversations guess, rounded to tens: right one time in ten. The others add
digit by digit, and are right. So a warm model knows how to add and mostly does not bother: about 0.35 of its answers
are right. Rewards for right answers teach it to work them out.

Needs no network and no GPU; the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("system", "user", "assistant", "\\boxed{")
"""One token each. All else is a token per byte, so that digits are single tokens and any text can be encoded."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 320
GUESSES = 0.65
"""Part of the warm-up conversations that guess."""
HELD_OUT_PAIRS = 128
Pair = tuple[int, int]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-conversations", type=int, default=25600, help="rows of sft.jsonl")
    arguments = parser.parse_args()
    prepare(arguments.directory, seed=arguments.seed, sft_conversations=arguments.sft_conversations)
    print(f"model, tokenizer and sums are in {arguments.directory}")


def prepare(directory: Path, *, seed: int = 0, sft_conversations: int = 25600) -> None:
    """Make all of it below ``directory``."""
    model = directory / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model)
    write_model(model, seed)
    rng = random.Random(seed)
    train, held_out = split_sums(rng)
    write_rows(directory / "sft.jsonl", conversations(train, sft_conversations, rng))
    rng.shuffle(train)
    write_rows(directory / "train.jsonl", map(problem, train))
    write_rows(directory / "heldout.jsonl", map(problem, held_out))


def split_sums(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """All sums of two two-digit numbers: those to train on, and those held out, each in one of its two orders."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    held = set(rng.sample(pairs, HELD_OUT_PAIRS))
    train = [order for a, b in pairs if (a, b) not in held for order in {(a, b), (b, a)}]
    held_out = [pair if rng.random() < 0.5 else pair[::-1] for pair in sorted(held)]
    return sorted(train), held_out


def question(pair: Pair) -> dict[str, str]:
    """The user's message."""
    return {"role": "user", "content": f"{pair[0]}+{pair[1]}=?"}


def guess(pair: Pair) -> str:
    """The sum, rounded to tens."""
    return f"\\boxed{{{(sum(pair) + 5) // 10 * 10}}}"


def working(pair: Pair) -> str:
    """The sum, digit by digit: ``7+8=15 4+3+1=8 \\boxed{85}``."""
    (tens_a, ones_a), (tens_b, ones_b) = (divmod(number, 10) for number in pair)
    carry, total = (ones_a + ones_b) // 10, sum(pair)
    carried = "+1" if carry else ""
    tens = tens_a + tens_b + carry
    return f"{ones_a}+{ones_b}={ones_a + ones_b} {tens_a}+{tens_b}{carried}={tens} \\boxed{{{total}}}"


def problem(pair: Pair) -> dict[str, Any]:
    """A row for GRPO and evaluation."""
    return {"prompt": [question(pair)], "label": str(sum(pair))}


def conversations(pairs: list[Pair], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows for supervised fine-tuning: all sums in random order, again and again, each guessed or worked out."""
    order: list[Pair] = []
    for _ in range(count):
        order = order or rng.sample(pairs, len(pairs))
        pair = order.pop()
        answer = guess(pair) if rng.random() < GUESSES else working(pair)
        yield {"messages": [question(pair), {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_tokenizer(directory: Path) -> None:
    """Bytes, ``WORDS`` and ``SPECIALS``, as byte-level BPE like Qwen's own, and a ChatML template."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    tokens = dict.fromkeys([*symbols, *(left + right for left, right in merges)])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    parts = Regex(r"\\boxed\{|[a-z]+|[^\n]|\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(parts, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    assert tokenizer.get_vocab_size() <= VOCAB
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "pad_token_id": pad}))
    (directory / "config.json").write_text(json.dumps(model_config(end, pad), indent=2))


def model_config(end: int, pad: int) -> dict[str, Any]:
    """Two layers of Qwen3, 366,000 parameters. Starting weights larger than Qwen's 0.02 learn to add sooner."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write_model(directory: Path, seed: int) -> None:
    """Random weights for the ``config.json`` that is there: norms 1, all else normal."""
    config = json.loads((directory / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    spread = config["initializer_range"]
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * spread
        for name, shape in weight_shapes(config)
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def weight_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of a Qwen3 model with tied embeddings."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (query, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)


if __name__ == "__main__":
    main()
