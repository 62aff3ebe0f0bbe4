"""The memory that a bucket is put together in, so that an engine's process can map it. Needs torch."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from miles.backends.weight_update.cuda_memory import Allocated, export

_PAGE = 4096


class BucketMemory(ABC):
    """``close`` it when nobody reads from it any more."""

    @abstractmethod
    def at_least(self, num_bytes: int) -> torch.Tensor:
        """uint8 ``[>= num_bytes]``. What it held, and tensors returned before, are lost if it has to grow."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What ``sglang_utils.shared_sources`` opens it with."""

    @abstractmethod
    def close(self) -> None:
        """Give it back."""


class MemoryFile(BucketMemory):
    """On a CPU: a file in memory, which has no name, so that nothing is left wherever a process ends."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        self._size = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def at_least(self, num_bytes: int) -> torch.Tensor:
        """See the base class."""
        if num_bytes > self._size:
            self._size = -(-num_bytes // _PAGE) * _PAGE
            os.ftruncate(self._fd, self._size)
            storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{self._fd}", shared=True, nbytes=self._size)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return self._bytes

    def describe(self) -> dict[str, Any]:
        """See the base class."""
        return {"pid": os.getpid(), "fd": self._fd, "inode": os.fstat(self._fd).st_ino, "size": self._size}

    def close(self) -> None:
        """Engines that have it mapped keep it until they let go."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self._fd)


class DeviceMemory(BucketMemory):
    """On a GPU: memory of the driver's, exported by CUDA IPC.

    Engines keep what they have opened until the update ends, and nothing may be freed that is open elsewhere: memory
    that has become too small is kept until ``close``, too.
    """

    def __init__(self, allocate: Callable[[int], Allocated] = Allocated) -> None:
        self._allocate = allocate
        self._allocated: list[Allocated] = []

    def at_least(self, num_bytes: int) -> torch.Tensor:
        """See the base class."""
        if not self._allocated or self._allocated[-1].tensor.numel() < num_bytes:
            self._allocated.append(self._allocate(num_bytes))
        return self._allocated[-1].tensor

    def describe(self) -> dict[str, Any]:
        """See the base class."""
        return export(self._allocated[-1].tensor)

    def close(self) -> None:
        """See the base class."""
        while self._allocated:
            self._allocated.pop().close()
