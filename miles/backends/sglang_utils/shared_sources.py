"""An engine's side of memory that a trainer's rank shares: opened, viewed as bytes, let go. Needs torch.

On a CPU memory files are opened through ``/proc``: no names in a file system, no helper process, nothing to clean up
whoever dies first. That takes the same user and the same view of processes, which are the same for all that an agent
starts. On a GPU the driver maps what the trainer's rank on the same GPU has exported.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from miles.backends.weight_update.cuda_memory import Opened


class SharedSources:
    """Of one update: each memory is opened once. ``close`` it at the end; it waits for the device."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int, int], torch.Tensor] = {}
        self._opened: dict[bytes, Opened] = {}

    def bytes_of(self, description: dict[str, Any]) -> torch.Tensor:
        """uint8 ``[size]``, as ``BucketMemory.describe`` describes it.

        Raises:
            OSError: the trainer's memory cannot be opened, or is not what the description says.
            CudaMemoryError: the driver refuses.
        """
        if "handle" not in description:
            return self._map(description)
        handle = description["handle"]
        if handle not in self._opened:
            self._opened[handle] = Opened(handle)
        return self._opened[handle].bytes_at(description["offset"], description["size"])

    def close(self) -> None:
        """Let go of everything."""
        self._mapped.clear()
        if self._opened:
            torch.cuda.current_stream().synchronize()
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def _map(self, description: dict[str, Any]) -> torch.Tensor:
        path = f"/proc/{description['pid']}/fd/{description['fd']}"
        facts = os.stat(path)
        key = (facts.st_dev, facts.st_ino, facts.st_size)  # it grows for a tensor larger than a bucket
        if facts.st_ino != description["inode"] or facts.st_size != description["size"]:
            raise FileNotFoundError(f"{path} is not the trainer's memory any more: {facts}")
        if key not in self._mapped:
            storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=description["size"])
            self._mapped[key] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return self._mapped[key]
