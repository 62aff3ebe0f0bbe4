"""Buckets: tensors laid out one after the other in memory, so that many travel as one. Needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

ALIGNMENT = 16
"""Each tensor begins at a multiple of this many bytes, so that it can be viewed in its own dtype."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a bucket: where it lies, in bytes from the bucket's begin.

    ``strides``, in elements, of a tensor that does not lie in one piece: only where the memory is the model's own.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    strides: tuple[int, ...] | None = None

    @property
    def dtype_name(self) -> str:
        """As torch calls it, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def as_plain(self) -> list[Any]:
        """For a message."""
        return [self.name, self.dtype_name, self.shape, self.start, self.num_bytes, self.strides]

    @classmethod
    def of_plain(cls, values: list[Any]) -> Entry:
        """What ``as_plain`` made."""
        name, dtype, shape, start, num_bytes, strides = values
        return cls(name, getattr(torch, dtype), tuple(shape), start, num_bytes, strides and tuple(strides))


@dataclass(slots=True)
class Bucket:
    """A bucket that is being filled. ``capacity`` is the most that it holds, but for one tensor that is larger.

    ``alignment`` 1 packs tensors without gaps, as a receiver expects that computes their places itself; a tensor that
    would lie askew then begins another bucket.
    """

    capacity: int
    alignment: int = ALIGNMENT
    entries: list[Entry] = field(default_factory=list)
    num_bytes: int = 0

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether it fits in."""
        if not self.entries:
            return True
        start = self._next()
        return start + tensor.nbytes <= self.capacity and start % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> Entry:
        """Make room for a tensor; the bytes are the caller's to copy."""
        start = self._next()
        entry = Entry(name, tensor.dtype, tuple(tensor.shape), start, tensor.nbytes)
        self.entries.append(entry)
        self.num_bytes = start + tensor.nbytes
        return entry

    def _next(self) -> int:
        return -(-self.num_bytes // self.alignment) * self.alignment


def copy_into(memory: torch.Tensor, entry: Entry, tensor: torch.Tensor) -> None:
    """Copy ``tensor`` to its place in ``memory``, uint8 ``[n]`` on any device."""
    target = memory[entry.start : entry.start + entry.num_bytes]
    target.view(entry.dtype).reshape(entry.shape).copy_(tensor, non_blocking=True)
