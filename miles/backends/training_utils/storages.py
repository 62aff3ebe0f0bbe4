"""Memory that is put away and comes back bit for bit.

What is put away are storages, not tensors: a storage loses its memory and later gets it back, so that all views into it
stay valid. On a CPU its pages go back to the system while its addresses stay (a storage that was ever seen through
numpy cannot be resized); on a GPU it is resized to nothing.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch

from miles_agents.errors import EnvironmentFault

logger = logging.getLogger(__name__)

Storage = torch.UntypedStorage

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class CannotSleep(EnvironmentFault):
    """The trainer's state could not be written to, or read back from, the place that it sleeps in."""

    code = "E-TRAIN-015"


def distinct_storages(tensors: Iterable[torch.Tensor]) -> list[Storage]:
    """Of these tensors, each once, in order; empty ones left out."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return list(found.values())


class Dropped:
    """Storages whose content is lost: what comes back is memory of that size."""

    def __init__(self, storages: list[Storage]) -> None:
        self._sizes = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            _release(storage)

    def restore(self) -> None:
        """Have the memory again."""
        for storage, size in self._sizes:
            _take_back(storage, size)

    def close(self) -> None:
        """Nothing to give back."""


class OnDisk:
    """Storages whose content is in a file without a name: it goes with this process, however that ends.

    Raises:
        CannotSleep: The file could not be written. Nothing has been put away then.
    """

    def __init__(self, storages: list[Storage], directory: Path, chunk_bytes: int) -> None:
        self._directory = directory
        self._chunk = chunk_bytes
        self._sizes = [(storage, storage.nbytes()) for storage in storages]
        self._file = self._write(directory)
        for storage in storages:
            _release(storage)

    def _write(self, directory: Path) -> IO[bytes]:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # open while asleep
            try:
                for storage, _ in self._sizes:
                    self._write_storage(file, storage)
            except OSError:
                file.close()
                raise
        except OSError as error:
            raise CannotSleep(
                f"the trainer's state could not be written to {directory}",
                evidence=f"{sum(size for _, size in self._sizes):,} bytes: {error}",
                advice="Make room there, choose another directory with --offload-train-disk-dir, "
                "or keep the state in memory with --offload-train-target cpu.",
                path=str(directory),
            ) from error
        return file

    def restore(self) -> None:
        """Read everything back, and close the file.

        Raises:
            CannotSleep: It cannot be read. The state is lost then.
        """
        try:
            self._file.seek(0)
            for storage, size in self._sizes:
                _take_back(storage, size)
                self._read_storage(storage)
        except OSError as error:
            raise CannotSleep(
                f"the trainer's state could not be read back from {self._directory}",
                evidence=str(error),
                advice="Start again from the newest checkpoint, with another --offload-train-disk-dir.",
                path=str(self._directory),
            ) from error
        self._file.close()

    def close(self) -> None:
        """Give the file back without reading it."""
        self._file.close()

    def _write_storage(self, file: IO[bytes], storage: Storage) -> None:
        """A storage of a GPU goes through a buffer of one chunk on the host."""
        if storage.device.type == "cpu":
            _write_all(file, _memory(storage))
            return
        for chunk in torch.split(_bytes(storage), self._chunk):
            _write_all(file, _memory(chunk.cpu().untyped_storage()))

    def _read_storage(self, storage: Storage) -> None:
        if storage.device.type == "cpu":
            _read_all(self._file, _memory(storage))
            return
        for chunk in torch.split(_bytes(storage), self._chunk):
            host = torch.empty(len(chunk), dtype=torch.uint8)
            _read_all(self._file, _memory(host.untyped_storage()))
            chunk.copy_(host)


class OnHost:
    """Storages of a GPU whose content is in pinned host memory."""

    def __init__(self, storages: list[Storage]) -> None:
        self._kept = []
        for storage in storages:
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            host.copy_(_bytes(storage), non_blocking=True)
            self._kept.append((storage, host))
        torch.cuda.synchronize()
        for storage in storages:
            _release(storage)

    def restore(self) -> None:
        """Copy everything back."""
        for storage, host in self._kept:
            _take_back(storage, host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    def close(self) -> None:
        """The host memory goes with this object."""


Kept = OnDisk | OnHost


def keep(storages: list[Storage], *, target: str, directory: Path, chunk_bytes: int) -> Kept | None:
    """Move them to where ``--offload-train-target`` says. None: they stay, because they are there already."""
    if target == "disk":
        return OnDisk(storages, directory, chunk_bytes)
    on_device = [storage for storage in storages if storage.device.type != "cpu"]
    if not on_device:
        logger.info(
            "--offload-train-target cpu: the trainer's state is in CPU memory already and stays there; "
            "--offload-train-target disk would free it"
        )
        return None
    return OnHost(on_device)


def return_memory() -> None:
    """Let the allocators give what they have free back to the system."""
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # buckets that engines have let go of
        torch.cuda.empty_cache()
    # Not in every C library.
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _release(storage: Storage) -> None:
    if storage.device.type != "cpu":
        storage.resize_(0)
        return
    # Whole pages only: its first and last ones may be others', too.
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    size = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if size > 0 and _LIBC.madvise(start, size, mmap.MADV_DONTNEED):
        logger.warning("%d bytes stay in memory: %s", size, os.strerror(ctypes.get_errno()))


def _take_back(storage: Storage, size: int) -> None:
    if storage.device.type != "cpu":
        storage.resize_(size)


def _bytes(storage: Storage) -> torch.Tensor:
    """uint8 view of all of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(host: Storage) -> memoryview:
    """Of a storage on the CPU, which lives for as long as this does. Not through numpy: that would mark it as not
    resizable for good."""
    array = (ctypes.c_ubyte * host.nbytes()).from_address(host.data_ptr())
    array.storage = host  # type: ignore[attr-defined]  # the address alone would keep nothing
    return memoryview(array).cast("B")


def _write_all(file: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def _read_all(file: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.readv(file.fileno(), [view[done:]])
        if not count:
            raise OSError("the file is shorter than what was written")
        done += count
