"""Copies of tensors to their places in a bucket: one by one on a CPU, in few launches on a GPU. Needs torch."""

from __future__ import annotations

import torch

from miles.backends.weight_update.buckets import Entry

_HELD_BYTES = 256 << 20
"""Tensors that wait to be copied are kept alive: so many bytes at the most."""


class BucketCopies:
    """What is still to be copied. ``flush`` before the bucket is handed on."""

    def __init__(self) -> None:
        self._flat: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._bytes = 0

    def add(self, memory: torch.Tensor, entry: Entry, tensor: torch.Tensor) -> None:
        """``tensor`` to its place in ``memory``, uint8 ``[n]``."""
        piece = memory[entry.start : entry.start + entry.num_bytes].view(entry.dtype)
        if tensor.device.type == "cpu" or not tensor.is_contiguous():
            piece.view(entry.shape).copy_(tensor, non_blocking=True)
            return
        targets, sources = self._flat.setdefault(entry.dtype, ([], []))
        targets.append(piece)
        sources.append(tensor.detach().view(-1))
        self._bytes += entry.num_bytes
        if self._bytes > _HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """All of them are under way on the current stream."""
        for targets, sources in self._flat.values():
            torch._foreach_copy_(targets, sources)
        self._flat.clear()
        self._bytes = 0
