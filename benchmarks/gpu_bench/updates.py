"""Weight updates into a real engine, without a run around them, and what they are measured against."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_bench.results import Results
from miles.backends.base import ParallelState
from miles.backends.weight_update.messages import WeightUpdate
from miles.backends.weight_update.sender import make_sender

Weights = Sequence[tuple[str, Any]]
WARM_UP = 3
"""The first update joins a group and records, the second checks what was recorded (``load_plan``)."""
TURNS = 8
_TIMEOUT_S = 40.0
_PARTS = ("connect", "gather", "copy", "wait", "engine", "engine_copy")


class Updates:
    """Updates by one sender, one after the other; ``close`` it. ``parallel``: of this rank; default: it is alone."""

    def __init__(self, update: WeightUpdate, device: Any, parallel: ParallelState | None = None) -> None:
        self._update = update
        self._sender = make_sender(parallel or ParallelState(), update, device)
        self.version = update.version
        self.num_bytes = 0

    def send(self, weights: Iterable[tuple[str, Any]], resident: Sequence[Any] = ()) -> dict[str, float]:
        """One update. Returns seconds by part."""
        update, first = self._update, self.version == self._update.version
        update = replace(update, version=self.version, new_group=first, timeout_s=_TIMEOUT_S)
        self.version += 1
        found = self._sender.send(update, iter(weights), resident)
        self.num_bytes = self._sender.num_bytes
        return {**found, "num_buckets": float(self._sender.num_buckets)}

    def change(self, weights: Weights) -> None:
        """Other weights than before, so that an update that does nothing is noticed."""
        import torch

        for _, tensor in weights:
            tensor.mul_(1 + 0.05 * torch.rand((), device=tensor.device).to(tensor.dtype))
        if weights[0][1].is_cuda:
            torch.cuda.synchronize(weights[0][1].device)

    def repeat(self, weights: Weights, resident: Sequence[Any] = ()) -> list[dict[str, float]]:
        """Updates with weights that change, without those that warm up."""
        found = []
        for _ in range(WARM_UP + TURNS):
            self.change(weights)
            found.append(self.send(weights, resident))
        return found[WARM_UP:]

    def close(self) -> None:
        """Give process groups back."""
        self._sender.close()


def tell(results: Results, name: str, found: Sequence[dict[str, float]], baseline_s: float, what: str) -> float:
    """One row. Returns the median seconds."""
    median = {part: statistics.median(each[part] for each in found) for part in found[0]}
    times = f"{median['total'] / baseline_s:.2f}" if baseline_s else "?"
    parts = ", ".join(f"{part} {1e3 * median[part]:.1f}" for part in _PARTS)
    results.add(
        name, median["total"] * 1e3, "ms",
        f"{times} times {what}; ms: {parts}; {median['num_buckets']:.0f} buckets; "
        f"least {1e3 * min(each['total'] for each in found):.1f}",
    )  # fmt: skip
    return median["total"]


def random_weights(path: Path, device: Any, *, in_one: bool) -> tuple[list[tuple[str, Any]], Any]:
    """Names and random tensors of the model that ``config.json`` describes, in bfloat16. ``in_one``: all of them views
    of one buffer, as Megatron's optimizer keeps parameters, which is returned, too."""
    import torch
    import transformers

    hf: Any = transformers
    with torch.device("meta"):
        made = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(path))
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    if made.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    if not in_one:
        return [(n, _random(torch.empty(s, dtype=torch.bfloat16, device=device))) for n, s in shapes.items()], None
    buffer = _random(torch.empty(sum(s.numel() for s in shapes.values()), dtype=torch.bfloat16, device=device))
    pieces = buffer.split([shape.numel() for shape in shapes.values()])
    return [(name, piece.view(shape)) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)], buffer


def _random(tensor: Any) -> Any:
    return tensor.normal_(0.0, 0.02)


def num_bytes_of(weights: Weights) -> int:
    """All of them."""
    return sum(tensor.nbytes for _, tensor in weights)
