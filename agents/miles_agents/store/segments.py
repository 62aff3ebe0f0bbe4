"""The memory of an agent's segments: memfds, made and given back on threads, so that a shortage is an error in time."""

from __future__ import annotations

import contextlib
import errno
import os

import psutil

from miles_agents.store.memory import Mapping

MAX_SEGMENTS = 10_000
_LEFT_FREE = 0.05
"""Of the machine's memory. Beyond it the kernel would rather kill somebody than say no."""
RESERVED_FDS = 300
"""Descriptors of the agent that are not for segments."""


class SegmentFile:
    """One memfd. Its pages are there from the start; nobody meets SIGBUS later because there are none."""

    def __init__(self, number: int, capacity: int) -> None:
        """Raises OSError if there is no memory for it."""
        memory = psutil.virtual_memory()
        if capacity > memory.available - _LEFT_FREE * memory.total:
            available = f"{memory.available} of {memory.total} bytes of the machine's memory are available"
            raise OSError(errno.ENOMEM, available)
        self.number = number
        self.capacity = capacity
        self.fd = os.memfd_create(f"miles-store-{number}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, capacity)
        except BaseException:
            os.close(self.fd)
            raise

    def writer_fd(self) -> int:
        """A descriptor through which it can be written."""
        return os.dup(self.fd)

    def reader_fd(self) -> int:
        """A descriptor of its own through which nothing can be written."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def map(self) -> Mapping:
        """All of it, shared, for this process."""
        return Mapping(self.fd, self.capacity, private=False)

    def close(self) -> None:
        """Give the memory back now: mappings that others keep of it hold nothing any more, and must not be touched."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)
        os.close(self.fd)

    def abandon(self) -> None:
        """Let go: the memory is the system's when the last mapping of it has ended."""
        os.close(self.fd)
