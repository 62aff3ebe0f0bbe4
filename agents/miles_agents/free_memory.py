"""Memory that the allocator keeps although nobody uses it."""

from __future__ import annotations

import ctypes
import gc


def return_free_memory() -> None:
    """Give the system back what importing has used and freed: up to 12 MiB if modules had to be compiled.

    For a process that stays small from then on. Where the C library is not glibc, nothing is done.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
