"""What is run: sizes of the model, the batch and the answers; how long each answer is. Pure."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Model:
    """A Qwen3-shaped model with tied embeddings, float32."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocab: int = 320

    @property
    def num_parameters(self) -> int:
        """All of them."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * (query + kv) + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.vocab * self.hidden + self.hidden

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.layers} layers, {self.num_parameters / 1e6:.1f}M parameters"


@dataclass(frozen=True, slots=True)
class Size:
    """One set of sizes.

    Attributes:
        model: What is trained.
        prompts: Prompts of an iteration.
        group: Answers to each prompt.
        steps: Optimizer steps of an iteration.
        micro_batch: Samples that go through TRL's model together.
        max_tokens: The most tokens that go through ours together (``--max-tokens-per-gpu``).
        shortest, longest: Tokens of an answer; lengths are spread evenly between.
        iterations: Measured.
        warm_up: Not measured; come first.
        update_model: Whose weights the update moves.
        updates: Measured; one more comes first.
    """

    name: str
    model: Model
    prompts: int
    group: int
    steps: int
    micro_batch: int
    max_tokens: int
    shortest: int
    longest: int
    iterations: int
    warm_up: int
    update_model: Model
    updates: int

    @property
    def samples(self) -> int:
        """Of an iteration."""
        return self.prompts * self.group

    @property
    def batch(self) -> int:
        """Samples of an optimizer step."""
        return self.samples // self.steps

    @property
    def num_rollouts(self) -> int:
        """Iterations, those that warm up included."""
        return self.warm_up + self.iterations

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Size:
        """The reverse."""
        models = {name: Model(**content[name]) for name in ("model", "update_model")}
        return cls(**{**content, **models})


REFERENCE = Size(
    name="reference",
    model=Model(hidden=512, layers=8, ffn=1536, heads=8, kv_heads=4),
    prompts=4,
    group=8,
    steps=2,
    micro_batch=8,
    max_tokens=2048,
    shortest=64,
    longest=256,
    iterations=4,
    warm_up=1,
    update_model=Model(hidden=768, layers=12, ffn=2848, heads=12, kv_heads=6),
    updates=7,
)
QUICK = Size(
    name="quick",
    model=Model(hidden=64, layers=2, ffn=128, heads=2, kv_heads=1, head_dim=32),
    prompts=2,
    group=4,
    steps=2,
    micro_batch=4,
    max_tokens=256,
    shortest=4,
    longest=12,
    iterations=2,
    warm_up=1,
    update_model=Model(hidden=64, layers=2, ffn=128, heads=2, kv_heads=1, head_dim=32),
    updates=3,
)


def answer_lengths(size: Size) -> list[list[int]]:
    """Tokens of each answer to each prompt, iteration after iteration.

    An iteration's lengths are always the same set, evenly spread, dealt out in another order: iterations can be
    compared, and within a group lengths differ.
    """
    dealer = random.Random(0)  # order only
    last = max(1, size.samples - 1)
    spread = [size.shortest + round(k * (size.longest - size.shortest) / last) for k in range(size.samples)]
    dealt = []
    for _ in range(size.num_rollouts):
        dealer.shuffle(spread)
        dealt += [spread[first : first + size.group] for first in range(0, size.samples, size.group)]
    return dealt


def tokens_per_iteration(size: Size) -> int:
    """Of all answers together; the same in each iteration."""
    return sum(sum(group) for group in answer_lengths(size)[: size.prompts])
