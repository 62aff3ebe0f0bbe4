"""Memory that is put away and comes back bit for bit.

What is put away are storages, not tensors: a storage is emptied and later filled in place, so that all views into it
stay valid.
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch

from miles.backends.megatron_utils.errors import CannotSleep

logger = logging.getLogger(__name__)

Storage = torch.UntypedStorage


def distinct_storages(tensors: Iterable[torch.Tensor]) -> list[Storage]:
    """Of these tensors, each once, in order; empty ones left out."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return list(found.values())


class Dropped:
    """Storages whose content need not be kept; they come back as zeros."""

    def __init__(self, storages: list[Storage]) -> None:
        self._sizes = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def restore(self) -> None:
        """Allocate them again."""
        for storage, size in self._sizes:
            storage.resize_(size)
            storage.fill_(0)

    def close(self) -> None:
        """Nothing to give back."""


class OnDisk:
    """Storages whose content is in a file without a name: it goes with this process, however that ends.

    Raises:
        CannotSleep: The file could not be written. Nothing has been emptied then.
    """

    def __init__(self, storages: list[Storage], directory: Path) -> None:
        self._sizes = [(storage, storage.nbytes()) for storage in storages]
        self._file = self._write(directory)
        for storage in storages:
            storage.resize_(0)

    def _write(self, directory: Path) -> IO[bytes]:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=directory, buffering=0)
            try:
                for storage, size in self._sizes:
                    _write_all(file, memoryview(_bytes(storage).cpu().numpy()), size)
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
        """Read everything back, and close the file."""
        self._file.seek(0)
        for storage, size in self._sizes:
            storage.resize_(size)
            if storage.device.type == "cpu":
                _read_all(self._file, memoryview(_bytes(storage).numpy()), size)
            else:
                staged = torch.empty(size, dtype=torch.uint8)
                _read_all(self._file, memoryview(staged.numpy()), size)
                _bytes(storage).copy_(staged)
        self._file.close()

    def close(self) -> None:
        """Give the file back without reading it."""
        self._file.close()


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
            storage.resize_(0)

    def restore(self) -> None:
        """Copy everything back."""
        for storage, host in self._kept:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    def close(self) -> None:
        """The host memory goes with this object."""


Kept = OnDisk | OnHost


def keep(storages: list[Storage], *, target: str, directory: Path) -> Kept | None:
    """Move them to where ``--offload-train-target`` says. None: they stay, because they are there already."""
    if target == "disk":
        return OnDisk(storages, directory)
    if all(storage.device.type == "cpu" for storage in storages):
        logger.info(
            "--offload-train-target cpu: the trainer's state is in CPU memory already and stays there; "
            "`--offload-train-target disk` would free it"
        )
        return None
    return OnHost(storages)


def return_memory() -> None:
    """Let the allocators give what they have free back to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # Not in every C library.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _bytes(storage: Storage) -> torch.Tensor:
    """uint8 view of all of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]


def _write_all(file: IO[bytes], view: memoryview, size: int) -> None:
    done = 0
    while done < size:
        done += file.write(view[done:])


def _read_all(file: IO[bytes], view: memoryview, size: int) -> None:
    done = 0
    while done < size:
        count = os.readv(file.fileno(), [view[done:]])
        assert count > 0, "the file is as long as it was written"
        done += count
