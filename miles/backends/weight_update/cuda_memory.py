"""GPU memory that another process maps: allocated and exported here, opened there, by CUDA's driver.

Not through torch's tensors over pipes: those keep reference counters in files, hold freed memory back until the other
process says so, and cannot hand on what its allocator maps piecewise (``expandable_segments``). Memory of ``Exported``
goes when it is closed, at once; who has it open must have let go. Driver API: cuMemAlloc, cuIpcGetMemHandle,
cuMemGetAddressRange, cuIpcOpenMemHandle (CUDA's documentation, "Memory Management").
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch

_LAZY_PEER_ACCESS = 1
_HANDLE_BYTES = 64
_this_thread = threading.local()


class CudaMemoryError(Exception):
    """The driver refused."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class _Bytes:
    """What ``torch.as_tensor`` makes a tensor of, without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


class Allocated:
    """Memory on the current device that is not torch's, so that it can be exported whatever torch's allocator does."""

    def __init__(self, num_bytes: int) -> None:
        try:
            self._address = _allocate(num_bytes)
        except CudaMemoryError:
            torch.cuda.empty_cache()  # what torch keeps for later is free, but not for the driver
            self._address = _allocate(num_bytes)
        self.tensor = torch.as_tensor(_Bytes(self._address, num_bytes), device="cuda")

    def close(self) -> None:
        """Give it back. Nobody may use the tensor any more, nor have it open."""
        if self._address:
            address, self._address = self._address, 0
            _call("cuMemFree_v2", ctypes.c_uint64(address))


def export(tensor: torch.Tensor) -> dict[str, Any]:
    """What another process opens the bytes of a contiguous tensor with: ``handle``, ``offset``, ``size``.

    Raises:
        CudaMemoryError: its memory cannot be exported, as is that of ``expandable_segments``.
    """
    address = tensor.data_ptr()
    handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    raw = ctypes.string_at(ctypes.addressof(handle), _HANDLE_BYTES)
    return {"handle": raw, "offset": address - int(base.value), "size": tensor.nbytes}


class Opened:
    """Memory of another process on the same GPU. ``close`` it when nothing on the device uses it any more."""

    def __init__(self, handle: bytes) -> None:
        address = ctypes.c_uint64()
        _call(
            "cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )  # fmt: skip
        self._address = int(address.value)

    def bytes_at(self, offset: int, size: int) -> torch.Tensor:
        """uint8 ``[size]``; valid until ``close``."""
        return torch.as_tensor(_Bytes(self._address + offset, size), device="cuda")

    def close(self) -> None:
        """Unmap it."""
        address, self._address = self._address, 0
        if address:
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def _allocate(num_bytes: int) -> int:
    """Returns the address. Raises CudaMemoryError."""
    address = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
    return int(address.value)


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaMemoryError(f"the driver of a GPU is not there: {error}") from None


def _call(name: str, *arguments: Any) -> None:
    """Raises CudaMemoryError."""
    driver = _driver()
    if not hasattr(_this_thread, "is_ready"):
        torch.cuda.mem_get_info()  # the runtime makes torch's context current in this thread
        _this_thread.is_ready = True
    result = getattr(driver, name)(*arguments)
    if result:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(result, ctypes.byref(text))
        raise CudaMemoryError(f"{name}: {(text.value or b'error').decode()} ({result})")
