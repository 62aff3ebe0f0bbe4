"""Colocated on a CPU: buckets in memory files that engines map. See ``sglang_utils.map_weights`` for their side.

A memory file has no name, so nothing is left wherever a process ends. Two of them take turns: one is filled while the
engines load from the other.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from miles.backends.weight_update.buckets import Bucket

TIMES_BYTES = 16
"""At the end of a file: seconds that the engine took to map it, and to load from it, as two float64."""
_PAGE = 4096


class SharedBuffer:
    """One memory file, mapped here. Grows if a bucket needs more."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        self._size = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Give the memory back; engines that have it mapped keep it until they let go."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self._fd)

    def memory(self, num_bytes: int) -> torch.Tensor:
        """uint8 ``[>= num_bytes]``, shared. Tensors that it returned before may not be used after it grew."""
        needed = -(-(num_bytes + TIMES_BYTES) // _PAGE) * _PAGE
        if needed > self._size:
            kept = self._bytes
            os.ftruncate(self._fd, needed)
            self._size = needed
            storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{self._fd}", shared=True, nbytes=needed)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
            del kept
        return self._bytes

    @property
    def engine_times(self) -> tuple[float, float]:
        """Seconds of the last engine that loaded from here: mapping, loading."""
        mapping, loading = self._bytes[self._size - TIMES_BYTES :].view(torch.float64).tolist()
        return mapping, loading

    def describe(self, bucket: Bucket, *, first: bool, last: bool) -> dict[str, Any]:
        """What ``map_weights.load`` reads."""
        return {
            "pid": os.getpid(),
            "fd": self._fd,
            "inode": os.fstat(self._fd).st_ino,
            "size": self._size,
            "times_at": self._size - TIMES_BYTES,
            "first": first,
            "last": last,
            "tensors": [
                {"name": e.name, "dtype": e.dtype_name, "shape": e.shape, "start": e.start, "bytes": e.num_bytes}
                for e in bucket.entries
            ],
        }


def payload_of(description: Mapping[str, Any]) -> str:
    """The description in the form in which SGLang takes tensors: one that is empty, with the description as name."""
    # torch passes an empty tensor on by value; any other would bring a descriptor, and a helper process, along.
    data = ForkingPickler.dumps([(json.dumps(description), torch.empty(0))])
    return base64.b64encode(bytes(data)).decode()
