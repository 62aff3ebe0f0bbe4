"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) by the flags: which linear layers have one, and how they
share. Imports no torch.

Layers are called as in Hugging Face checkpoints, by the last part of their names. An adapter adds ``alpha / rank * B A
x`` to what a layer makes of ``x``; ``A`` is ``[rank, in]``, ``B`` is ``[out, rank]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALL_LINEAR = "all-linear"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a decoder layer, of its MLP or of each of its experts. Routers, embeddings and the output layer get
no adapter."""
JOINED = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""What Megatron has as one layer, by its name for it."""
TYPES = ("lora", "canonical_lora")
"""``lora``: layers of one input that Megatron joins share their ``A``. ``canonical_lora``: each has its own."""
ADAPTER_DIRECTORY, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
"""Below a checkpoint, and the names in it that ``peft`` reads."""


@dataclass(frozen=True)
class LoraSettings:
    """The flags of these names. ``targets``: of :data:`MODULES`, in that order; ``seed``: of the first values."""

    rank: int
    alpha: int
    dropout: float
    kind: str
    targets: tuple[str, ...]
    seed: int
    adapter_path: str | None = None

    @property
    def scaling(self) -> float:
        """What ``B A x`` is multiplied by."""
        return self.alpha / self.rank

    @classmethod
    def from_args(cls, args: Any) -> LoraSettings | None:
        """Of resolved flags; None: no adapters."""
        rank = int(getattr(args, "lora_rank", 0) or 0)
        if not rank:
            return None
        targets = target_modules(args.target_modules, getattr(args, "exclude_modules", None))
        return cls(
            rank=rank,
            alpha=int(getattr(args, "lora_alpha", 16)),
            dropout=float(getattr(args, "lora_dropout", 0.0) or 0.0),
            kind=getattr(args, "lora_type", None) or "lora",
            targets=targets,
            seed=int(args.seed),
            adapter_path=getattr(args, "lora_adapter_path", None),
        )

    def sharer(self, module: str) -> str:
        """Whose ``A`` a layer uses: its own name, or that of another layer of the same block.

        Args:
            module: Full name, such as ``model.layers.0.self_attn.k_proj``.
        """
        if self.kind == "canonical_lora":
            return module
        parent, _, name = module.rpartition(".")
        joined = next(parts for parts in JOINED.values() if name in parts)
        return f"{parent}.{next(part for part in joined if part in self.targets)}"

    def has(self, module: str) -> bool:
        """Whether a layer has an adapter."""
        return module.rpartition(".")[2] in self.targets


def unknown_modules(words: str | None) -> list[str]:
    """Of a list of modules, those that there are not."""
    known = {ALL_LINEAR, *MODULES, *JOINED}
    return [word for word in _words(words) if word not in known]


def target_modules(targets: str | None, excluded: str | None) -> tuple[str, ...]:
    """``all-linear``, or names with commas between, of Hugging Face or of Megatron; without those of ``excluded``."""
    left = _modules(targets) - _modules(excluded)
    return tuple(module for module in MODULES if module in left)


def _modules(words: str | None) -> set[str]:
    found: set[str] = set()
    for word in _words(words):
        found |= set(MODULES) if word == ALL_LINEAR else set(JOINED.get(word, (word,)))
    return found


def _words(words: str | None) -> list[str]:
    return [word for part in (words or "").split(",") if (word := part.strip())]
