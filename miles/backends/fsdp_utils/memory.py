"""Where the trainer's state is while engines have the memory: storages are emptied, and their bytes kept elsewhere.

``disk``: one file per rank and part, written and read in chunks. It has no name, so that it goes with the process,
however that ends. ``cpu``: pinned memory of the host; what is there already stays. Tensors stay the
same objects throughout: only their storages shrink to nothing and grow again, bit for bit as they were.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import torch

from miles.backends.fsdp_utils.errors import FsdpAsleep, OffloadFailed
from miles.backends.fsdp_utils.settings import OffloadSettings

logger = logging.getLogger(__name__)


@dataclass
class _Part:
    """Storages that went away together, and where their bytes are: in ``file`` one after the other, or in ``host``."""

    storages: list[torch.UntypedStorage]
    sizes: list[int]
    file: BinaryIO | None = None
    host: list[torch.Tensor] = field(default_factory=list)


class Sleeper:
    """Parts of this rank's state by name, awake or away. ``level``: how deep the sleep is; 0: awake."""

    def __init__(self, settings: OffloadSettings, device: torch.device, rank: int, *, on_host: bool) -> None:
        self._settings = settings
        self._device = device
        self._stays = on_host and settings.target == "cpu"
        self._rank = rank
        self._away: dict[str, _Part] = {}
        self.level = 0
        if self._stays:
            logger.info("--offload-train-target cpu: the trainer's state is in the host's memory, and stays there")

    def put_away(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Free the memory of ``tensors``, which must not be touched until ``take_back``. Nothing to do if away.

        Raises:
            OffloadFailed: The disk is full, or does not work. Nothing is freed then.
        """
        if name in self._away or self._stays:
            return
        storages = _storages(tensors)
        part = _Part(storages, [storage.nbytes() for storage in storages])
        if self._settings.target == "disk":
            self._write(name, part)
        else:
            part.host = [_to_host(storage) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        self._away[name] = part

    def check_awake(self, what: str, *, level: int = 1) -> None:
        """Emptied memory must not be touched.

        Raises:
            FsdpAsleep: The sleep is ``level`` deep, or deeper.
        """
        if self.level >= level:
            raise FsdpAsleep(
                f"cannot {what} while asleep at level {self.level}",
                evidence="its memory has been put away by sleep()",
                advice="Call wake_up() first.",
            )

    def give_back(self) -> None:
        """What was freed goes to the system, or to whoever else uses the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            _trim()

    def take_back(self) -> None:
        """All parts are where they were, and files are gone.

        Raises:
            OffloadFailed: A file cannot be read. The state is lost then.
        """
        for name in list(self._away):
            part = self._away[name]
            for storage, size in zip(part.storages, part.sizes, strict=True):
                storage.resize_(size)
            if part.file is not None:
                self._read(part, part.file)
            else:
                for storage, host in zip(part.storages, part.host, strict=True):
                    _bytes_of(storage).copy_(host, non_blocking=False)
            del self._away[name]
        self.level = 0

    def close(self) -> None:
        """Leave no file behind."""
        for part in self._away.values():
            if part.file is not None:
                part.file.close()
        self._away.clear()

    def _write(self, name: str, part: _Part) -> None:
        path = self._settings.directory / f"{name}-rank{self._rank:05d}-{os.getpid()}.bin"
        file = None
        try:
            self._settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = path.open("w+b", buffering=0)
            path.unlink()
            for storage in part.storages:
                for chunk in self._chunks(storage):
                    _write_all(file.fileno(), chunk.cpu())
        except OSError as error:
            if file is not None:
                file.close()
            raise OffloadFailed(
                f"the trainer's {name} state cannot be written to {self._settings.directory}",
                evidence=f"{error}; {sum(part.sizes)} bytes are needed",
                advice="Make room there, or give another --offload-train-disk-dir.",
            ) from error
        part.file = file

    def _read(self, part: _Part, file: BinaryIO) -> None:
        try:
            file.seek(0)
            for storage in part.storages:
                for chunk in self._chunks(storage):
                    staged = chunk if chunk.device.type == "cpu" else torch.empty_like(chunk, device="cpu")
                    _read_all(file.fileno(), staged)
                    if staged is not chunk:
                        chunk.copy_(staged)
            file.close()
        except OSError as error:
            raise OffloadFailed(
                f"the trainer's state cannot be read back from {self._settings.directory}",
                evidence=str(error),
                advice="Start again from the newest checkpoint, with another --offload-train-disk-dir.",
            ) from error

    def _chunks(self, storage: torch.UntypedStorage) -> Sequence[torch.Tensor]:
        whole = _bytes_of(storage)
        return torch.split(whole, self._settings.chunk_bytes) if len(whole) else ()


def _storages(tensors: Sequence[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Those that the tensors live in, each once, none that is empty."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 ``[n]``, the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _to_host(storage: torch.UntypedStorage) -> torch.Tensor:
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    return host.copy_(_bytes_of(storage))


def _write_all(descriptor: int, chunk: torch.Tensor) -> None:
    view = _memory(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_all(descriptor: int, chunk: torch.Tensor) -> None:
    view = _memory(chunk)
    while view:
        count = os.readv(descriptor, [view])
        if not count:
            raise OSError("the file is shorter than what was written")
        view = view[count:]


def _memory(chunk: torch.Tensor) -> memoryview:
    """Of uint8 ``[n]`` on the CPU. Not by numpy: a storage that numpy has seen does not change its size again."""
    return memoryview((ctypes.c_ubyte * len(chunk)).from_address(chunk.data_ptr())).cast("B")


def _trim() -> None:
    """The C library keeps freed memory for later unless asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
