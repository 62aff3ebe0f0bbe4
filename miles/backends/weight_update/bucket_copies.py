"""Copies of tensors to their places in a bucket: one by one on a CPU, small ones in few launches on a GPU. Needs
torch."""

from __future__ import annotations

import sys

import torch

from miles.backends.weight_update.buckets import Entry, copy_into

COPIED_ALONE_BYTES = 16 << 20
"""From here on a copy is worth a launch of its own: the driver's copies are faster than the kernel of
``_foreach_copy_`` (H200, reading and writing: 4.3 TB/s against 2.4). Beside a broadcast that is no gain, as they take
from it what they take more of the memory's bandwidth (8B parameters: 1.3 ms later)."""
_HELD_BYTES = 256 << 20
"""Tensors that wait to be copied are kept alive: so many bytes at the most."""


class BucketCopies:
    """What is still to be copied. ``flush`` before the bucket is handed on. ``together``: on a GPU;
    ``beside_broadcast``: also large tensors."""

    def __init__(self, *, together: bool, beside_broadcast: bool = False) -> None:
        self._together = together
        self._alone_bytes = sys.maxsize if beside_broadcast else COPIED_ALONE_BYTES
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._flat: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._bytes = 0

    def add(self, memory: torch.Tensor, entry: Entry, tensor: torch.Tensor) -> None:
        """``tensor`` to its place in ``memory``, uint8 ``[n]``."""
        if not (self._together and tensor.is_contiguous()) or entry.num_bytes >= self._alone_bytes:
            copy_into(memory, entry, tensor)
            return
        piece = self._view(memory, entry.dtype).narrow(0, entry.start // entry.dtype.itemsize, tensor.numel())
        targets, sources = self._flat.setdefault(entry.dtype, ([], []))
        targets.append(piece)
        sources.append(tensor.view(-1))
        self._bytes += entry.num_bytes
        if self._bytes > _HELD_BYTES:
            self.flush()

    def _view(self, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The whole memory in a dtype: made once, as making one costs as much as the copy of a small tensor."""
        key = (memory.data_ptr(), dtype)
        if key not in self._typed:
            self._typed[key] = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        return self._typed[key]

    def flush(self) -> None:
        """All of them are under way on the current stream."""
        with torch.no_grad():
            for targets, sources in self._flat.values():
                torch._foreach_copy_(targets, sources)
        self._flat.clear()
        self._typed.clear()  # another memory may have the address of one that is gone
        self._bytes = 0
