"""The model's own memory, handed to engines as it is, without a copy into buckets. On GPUs. Needs torch.

Optimizers keep parameters of a model as views of a few large buffers. Opening memory of another process costs about as
much as copying some hundred megabytes, so only buffers that hold several parameters are handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from miles.backends.weight_update.buckets import Entry
from miles.backends.weight_update.cuda_memory import CudaMemoryError, export

_LEAST_BYTES = 16 << 20
_LEAST_PARAMETERS = 4


class OwnMemory:
    """Of one update. ``resident``: parameters that stay where they are, and as they are, until it is over."""

    def __init__(self, resident: Sequence[torch.Tensor]) -> None:
        counts: dict[int, int] = {}
        for tensor in resident:
            if tensor.is_cuda and tensor.untyped_storage().nbytes() >= _LEAST_BYTES:
                address = tensor.untyped_storage().data_ptr()
                counts[address] = counts.get(address, 0) + 1
        self._shared = {address for address, count in counts.items() if count >= _LEAST_PARAMETERS}
        self._descriptions: dict[int, dict[str, Any] | None] = {}

    def description(self, tensor: torch.Tensor) -> dict[str, Any] | None:
        """Of the buffer that a tensor lies in; None: it has to be copied."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._shared:
            return None
        if address not in self._descriptions:
            self._descriptions[address] = _exported(storage, tensor.device)
        return self._descriptions[address]


class OwnBuckets:
    """What is to be handed over next, by buffer. Buffers may lie in one allocation, and so have the same handle."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._waiting: dict[tuple[bytes, int], tuple[list[Entry], dict[str, Any]]] = {}

    def add(self, description: dict[str, Any], entry: Entry) -> None:
        """A tensor of the buffer that is described."""
        entries, _ = self._waiting.setdefault((description["handle"], description["offset"]), ([], description))
        entries.append(entry)
        self.num_bytes += entry.num_bytes

    def take(self) -> list[tuple[list[Entry], dict[str, Any]]]:
        """All of it: by buffer, its tensors, and its description."""
        taken, self._waiting, self.num_bytes = list(self._waiting.values()), {}, 0
        return taken


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """Where a tensor lies in its own buffer."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Entry(name, tensor.dtype, tuple(tensor.shape), start, tensor.nbytes, strides)


def _exported(storage: torch.UntypedStorage, device: torch.device) -> dict[str, Any] | None:
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    try:
        return export(whole)
    except CudaMemoryError:
        return None
