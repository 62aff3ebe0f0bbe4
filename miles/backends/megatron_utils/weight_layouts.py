"""How one Megatron parameter is made of Hugging Face tensors, and cut for tensor parallelism.

Every layout maps the Hugging Face tensors of a parameter to the shard of one tensor-parallel rank, and the shards of
all ranks back. Both only move values: going there and back is exact. ``H`` is the hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

Tensors = Sequence[torch.Tensor]


class Layout(ABC):
    """See the module's docstring."""

    sharded = True
    """Whether ranks hold different parts."""

    @abstractmethod
    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """What ``rank`` of ``size`` holds. May be a view."""

    @abstractmethod
    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """The Hugging Face tensors, from the shards by rank."""


class Replicated(Layout):
    """The same on all ranks: norms."""

    sharded = False

    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """See ``Layout``."""
        return tensors[0]

    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """See ``Layout``."""
        return [shards[0]]


@dataclass(frozen=True)
class Cut(Layout):
    """Cut along one dimension: 0 for column-parallel linears, 1 for row-parallel ones."""

    dim: int

    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """See ``Layout``."""
        return tensors[0].chunk(size, self.dim)[rank]

    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """See ``Layout``."""
        return [shards[0] if len(shards) == 1 else torch.cat(list(shards), self.dim)]


@dataclass(frozen=True)
class Vocabulary(Layout):
    """``[vocab, H]``, padded with rows of zeros so that all ranks get as many rows."""

    vocab: int
    padded: int

    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """See ``Layout``."""
        rows = self.padded // size
        part = tensors[0][rank * rows : (rank + 1) * rows]
        return part if len(part) == rows else F.pad(part, (0, 0, 0, rows - len(part)))

    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """See ``Layout``."""
        whole = shards[0] if len(shards) == 1 else torch.cat(list(shards))
        return [whole[: self.vocab]]


@dataclass(frozen=True)
class FusedQKV(Layout):
    """Queries, keys and values by group: ``[q ... q k v | q ... q k v | ...]``, one group per key-value head.

    Weights ``[heads * d, H]``, ``[kv_heads * d, H]`` twice, or biases without ``H``.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """See ``Layout``."""
        groups = [torch.unflatten(tensor, 0, (self.kv_heads, -1)) for tensor in tensors]
        if self.kv_heads % size:
            # Fewer groups than ranks: megatron.core cuts through groups, and gathers before use.
            return torch.cat(groups, 1).flatten(0, 1).chunk(size)[rank]
        return torch.cat([group.chunk(size)[rank] for group in groups], 1).flatten(0, 1)

    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """See ``Layout``."""
        whole = shards[0] if len(shards) == 1 else torch.cat(list(shards))
        queries = self.heads // self.kv_heads * self.head_dim
        parts = torch.split(torch.unflatten(whole, 0, (self.kv_heads, -1)), [queries, self.head_dim, self.head_dim], 1)
        return [part.flatten(0, 1) for part in parts]


class GateAndUp(Layout):
    """The two ``[ffn, H]`` of a gated MLP: each rank holds its part of the one, then of the other."""

    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """See ``Layout``."""
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """See ``Layout``."""
        halves = [shard.chunk(2) for shard in shards]
        if len(halves) == 1:
            return list(halves[0])
        return [torch.cat([pair[i] for pair in halves]) for i in range(2)]


class SwappedHalves(Layout):
    """``[H, 2 H]`` of two inputs side by side, which come in the other order; column parallel."""

    def shard(self, tensors: Tensors, rank: int, size: int) -> torch.Tensor:
        """See ``Layout``."""
        return torch.cat(tensors[0].chunk(size)[rank].chunk(2, 1)[::-1], 1)

    def merge(self, shards: Tensors) -> list[torch.Tensor]:
        """See ``Layout``."""
        whole = shards[0] if len(shards) == 1 else torch.cat(list(shards))
        return [torch.cat(whole.chunk(2, 1)[::-1], 1)]
