"""Memory of segments in this process: mapped, copied into, read from, let go. Everything here releases the interpreter.

Mapping costs more than copying: on common kernels every page that is touched for the first time through a mapping
costs a fault. So mappings are kept and used again. A reader's mapping is private: what its arrays change are copies of
pages, which are found (``/proc/self/pagemap``) and dropped before the mapping serves another object.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from miles_agents.store.layout import PAGE
from miles_agents.wire.codec_tags import Gathered

_PRESENT_OR_SWAPPED = 0xC0
_OF_THE_FILE = 0x20
_PAGEMAP_CHUNK = 1 << 20
_MADV_DONTNEED = 4
_COPY_PIECE = 16 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MARKED = bytes(int(bool(top & _PRESENT_OR_SWAPPED) and not top & _OF_THE_FILE) for top in range(256))


_OWNER = compile("", "<store>", "exec")


class Mapping:
    """Some bytes of a file, mapped for as long as this object, or a view of it, lives."""

    def __init__(self, fd: int, nbytes: int, *, offset: int = 0, private: bool, populate: bool = False) -> None:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        if populate and not private:  # of a private writable mapping, populating would copy every page
            flags |= mmap.MAP_POPULATE
        address = _mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
        if address is None or address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} (mapping {nbytes} bytes)")
        self.address: int = address
        self.nbytes = nbytes
        self._unmap = weakref.finalize(self, _munmap, address, nbytes)
        self._unmap.atexit = False

    def unmap(self) -> None:
        """End the mapping now; no view of it may be used any more. For threads: it takes time if it is large."""
        self._unmap()

    def exporter(self, nbytes: int) -> Any:
        """An object whose buffer is the first ``nbytes``. Views keep it alive; this mapping has to live as long."""
        return (ctypes.c_char * nbytes).from_address(self.address)

    def exporter_until(self, nbytes: int, on_gone: Callable[[], None]) -> Any:
        """An ``exporter``; ``on_gone`` is called when no view of it can be read any more, not at the process's end.

        A weak reference to the exporter itself would be too early: views like ``memoryview`` take part in cycles, and
        the garbage collector calls back for weak references into a cycle before the cycle's ``__del__``, which may
        read the view, or hand it to somebody. So it is to something that the exporter owns and that the collector
        does not track, which therefore ends only with the exporter. Code objects are that: untracked, and weakly
        referenceable.
        """
        exporter = self.exporter(nbytes)
        exporter.owner = _OWNER.replace()
        weakref.finalize(exporter.owner, on_gone).atexit = False
        return exporter

    def drop_private_pages(self) -> bool:
        """Forget what was written through a private mapping. False if this kernel does not show what was."""
        first, count = self.address // PAGE, -(-self.nbytes // PAGE)
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            for start in range(0, count, _PAGEMAP_CHUNK // 8):
                pages = min(count - start, _PAGEMAP_CHUNK // 8)
                entries = os.pread(fd, pages * 8, (first + start) * 8)
                if len(entries) != pages * 8 or not self._drop_marked(entries[7::8].translate(_MARKED), start):
                    return False
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _drop_marked(self, marks: bytes, start: int) -> bool:
        begin = marks.find(1)
        while begin >= 0:
            end = marks.find(0, begin)
            end = len(marks) if end < 0 else end
            if _madvise(self.address + (start + begin) * PAGE, (end - begin) * PAGE, _MADV_DONTNEED):
                return False
            begin = marks.find(1, end)
        return True


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]


def copy_threads() -> int:
    """How many threads copy a large buffer: one core of two stays free for the actor and its I/O thread."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def copy_bytes(address: int, source: bytes) -> None:
    """Copy a few bytes to an address."""
    ctypes.memmove(address, source, len(source))


def copy_into(to: int, source: memoryview | Gathered) -> None:
    """Copy a buffer to an address, without holding the interpreter, on several threads if it is large."""
    if isinstance(source, Gathered):
        source.write(memoryview((ctypes.c_char * source.nbytes).from_address(to)).cast("B"))
        return
    with _held(source) as address:
        _copy(to, address, source.nbytes)


def address_of(source: memoryview | Gathered) -> int:
    """Where a buffer is; 0 for one that is in several places."""
    if isinstance(source, Gathered):
        return 0
    with _held(source) as address:
        return address


@contextlib.contextmanager
def _held(source: memoryview) -> Iterator[int]:
    held = _PyBuffer()
    _get_buffer(source, ctypes.byref(held), 0)
    try:
        yield held.buf or 0
    finally:
        _release_buffer(ctypes.byref(held))


def _copy(to: int, start: int, nbytes: int) -> None:
    threads = copy_threads()
    if threads == 1 or nbytes < 2 * _COPY_PIECE:
        ctypes.memmove(to, start, nbytes)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="store-copy") as pool:  # leaving waits for all of them
        for begin in range(0, nbytes, _COPY_PIECE):
            pool.submit(ctypes.memmove, to + begin, start + begin, min(_COPY_PIECE, nbytes - begin))
