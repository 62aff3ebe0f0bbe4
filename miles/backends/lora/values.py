"""First values of adapters, the weights that come of merging them, and the checksum of what they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from miles.backends.lora.files import Pair, check_config, check_modules, read_adapter
from miles.utils.lora import LoraSettings

_ROWS = 1 << 22
"""Numbers that a checksum looks at together."""


def is_below(base: Path, source: Path) -> bool:
    """Whether a model without its adapters, which stand on ``base``, has the weights of ``source``: then nobody needs a
    second model of these. Both are directories of weights themselves: of one checkpoint, not of several."""
    return base.resolve() == source.resolve()


class Switch:
    """Whether adapters count: without them a model is what it was before."""

    def __init__(self) -> None:
        self.on = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The model below, for as long as this lasts."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


class FirstValues:
    """Whole pairs by layer: those of ``--lora-adapter-path``, or fresh ones, which change nothing yet (``B`` is 0).

    Fresh ones depend on the seed and the layer's name only: not on the backend, and not on how the model is cut.

    Args:
        widths: ``(out, in)`` of each layer that has an adapter, by full name.

    Raises:
        BadAdapter: The path holds none that fits.
    """

    def __init__(self, settings: LoraSettings, widths: Mapping[str, tuple[int, int]]) -> None:
        self._settings = settings
        self._widths = widths
        self._given: dict[str, Pair] = {}
        if settings.adapter_path:
            path = Path(settings.adapter_path)
            config, self._given = read_adapter(path)
            check_config(path, config, settings)
            check_modules(path, self._given, settings, widths)

    def pair(self, module: str) -> Pair:
        """float32, on the CPU."""
        if self._given:
            a, b = self._given[module]
            return a.float(), b.float()
        rows, columns = self._widths[module]
        a = fresh_a(self._settings.sharer(module), self._settings.rank, columns, self._settings.seed)
        return a, torch.zeros(rows, self._settings.rank)


def fresh_a(name: str, rank: int, columns: int, seed: int) -> torch.Tensor:
    """float32 ``[rank, columns]``, uniform in ``±1 / sqrt(columns)``: Kaiming's with a = sqrt 5, as ``peft`` has it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def merged(weight: torch.Tensor, pair: Pair, scaling: float) -> torch.Tensor:
    """``weight + scaling * B A``, computed in float32, in the dtype of ``weight``."""
    a, b = (part.detach().to(weight.device, torch.float32) for part in pair)
    return torch.addmm(weight.detach().float(), b, a, alpha=scaling).to(weight.dtype)


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """int64: the sum of the bits of all numbers, taken as float32 and then as whole numbers (modulo 2^64).

    Exact, so that it does not depend on order: sums over the parts of a tensor, on whatever ranks, add up to its own.
    """
    flat = tensor.detach().reshape(-1)
    parts = [part.float().view(torch.int32).sum(dtype=torch.int64) for part in torch.split(flat, _ROWS)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.int64, device=tensor.device)
