"""The memory of an agent's segments: memfds, made and given back on threads, so that a shortage is an error in time."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable

from miles_agents.agent.inventory import LEFT_FREE, memory_left
from miles_agents.store.memory import Mapping

MAX_SEGMENTS = 10_000
_LOOK_AGAIN_S = 1.0
RESERVED_FDS = 300
"""Descriptors of the agent that are not for segments."""


class SegmentFile:
    """One memfd. Its pages are there from the start; nobody meets SIGBUS later because there are none."""

    def __init__(self, number: int, capacity: int) -> None:
        """Raises OSError if there is no memory for it."""
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


class SegmentMaker:
    """Makes segments on several threads without taking together what each alone might.

    Args:
        left: How much memory can still be taken, and how much there is in all.
    """

    def __init__(self, left: Callable[[], tuple[int, int]] = memory_left) -> None:
        self._left = left
        self._changed = threading.Condition()
        self._being_made = 0

    def make(self, number: int, capacity: int) -> SegmentFile:
        """A segment. Raises OSError if there is no memory for it."""
        self.claim(capacity)
        try:
            return SegmentFile(number, capacity)
        finally:
            self.done(capacity)

    def done(self, capacity: int) -> None:
        """What was claimed is taken, or not wanted."""
        with self._changed:
            self._being_made -= capacity
            self._changed.notify_all()

    def claim(self, capacity: int) -> None:
        """Count in memory that is about to be taken. Raises OSError if there is not so much."""
        with self._changed:
            while True:
                left, everything = self._left()
                if capacity <= left - LEFT_FREE * everything - self._being_made:
                    self._being_made += capacity
                    return
                if not self._being_made:
                    raise OSError(errno.ENOMEM, f"{left} of {everything} bytes of memory are available")
                # What others are making is counted twice, in part: only once they are done can a no be trusted. They
                # end without anybody's help; meanwhile others may have given memory back.
                self._changed.wait(_LOOK_AGAIN_S)
