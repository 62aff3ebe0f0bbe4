"""The journal of train batches: what was given to the trainer and may have to be trained on again. A file per rollout.

Consumes: the parts of a rollout as they went into the store. Produces: the same parts, as long as no checkpoint covers
them. Waits for: the disk. Invariants: a file that has its name is whole and on the disk (written aside, made durable,
renamed); it is written before the trainer hears of the rollout. No file is executed on reading: values are in the
store's encoding, which has no limit of size.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from miles.rollout.messages import RolloutBatchRefs
from miles.rollout.saved_state import NotSavable, cannot_save
from miles.utils.rollout_state import sync
from miles_agents.errors import EnvironmentFault, MilesError
from miles_agents.wire.codec import Gathered, decode_bulk, encode_bulk
from miles_agents.wire.codec_types import CannotTravel

_MAGIC = b"miles batch 1\n"
_NAME = re.compile(r"batch_(\d{7,})\.msgpack")


class DamagedBatch(EnvironmentFault):
    """A file of the batch journal cannot be read."""

    code = "E-REC-003"


@dataclass(frozen=True)
class Batch:
    """What a rollout came to.

    Attributes:
        answer: What the loop was told, or would have been.
        parts: Of ``split_train_data``: columns by name, for each data-parallel rank.
    """

    answer: RolloutBatchRefs
    parts: list[dict[str, Any]]


class BatchJournal:
    """The files in one directory. One writer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, rollout_id: int, batch: Batch) -> None:
        """Durable on return.

        Raises:
            CannotSave: The disk is full, or the directory cannot be written.
            NotSavable: A column that a conversion of the user's made holds an object that cannot be saved.
        """
        path = self._path(rollout_id)
        aside = path.with_name(f".{path.name}.aside")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                _write(file, {"answer": batch.answer, "parts": batch.parts})
            aside.rename(path)
            sync(path.parent)
        except OSError as error:
            raise cannot_save(path, error) from error
        except CannotTravel as error:
            raise NotSavable(
                f"{path.name}: the train data of a rollout cannot be saved",
                evidence=f"{error.what}\n{error.evidence}",
                advice="Keep plain values, arrays or registered types in what is converted to train data.",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def read(self, rollout_id: int) -> Batch:
        """Inverse of ``write``.

        Raises:
            DamagedBatch: It is not there, or not as it was written.
        """
        path = self._path(rollout_id)
        try:
            with path.open("rb") as file:
                found = _read(file)
            return Batch(found["answer"], found["parts"])
        except (OSError, ValueError, KeyError, TypeError, MilesError) as error:
            raise DamagedBatch(
                f"{path} cannot be read",
                evidence=f"{type(error).__name__}: {error}",
                advice="Start again from the newest checkpoint (--resume auto); this file is not needed then.",
            ) from error

    def rollouts(self) -> list[int]:
        """Those that there are, in order."""
        return sorted(int(match[1]) for path in self._files() if (match := _NAME.fullmatch(path.name)))

    def num_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self._files())

    def remove_through(self, rollout_id: int) -> None:
        """Forget this rollout and all before it: a checkpoint has them."""
        self._remove(lambda found: found <= rollout_id)

    def remove_after(self, rollout_id: int) -> None:
        """Forget all behind this rollout: the state that goes with them was never written."""
        self._remove(lambda found: found > rollout_id)

    def _remove(self, chosen: Any) -> None:
        for rollout_id in filter(chosen, self.rollouts()):
            self._path(rollout_id).unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [path for path in self.directory.glob("batch_*.msgpack") if _NAME.fullmatch(path.name)]

    def _path(self, rollout_id: int) -> Path:
        return self.directory / f"batch_{rollout_id:07d}.msgpack"


def _write(file: BinaryIO, value: Any) -> None:
    body, buffers = encode_bulk(value, what="batch")
    sizes = msgpack.packb([len(body), [buffer.nbytes for buffer in buffers]])
    file.write(_MAGIC + len(sizes).to_bytes(8, "little") + sizes + body)
    for buffer in buffers:
        if isinstance(buffer, Gathered):
            ordered = bytearray(buffer.nbytes)
            buffer.write(memoryview(ordered))
            file.write(ordered)
        else:
            file.write(buffer)
    file.flush()
    os.fsync(file.fileno())


def _read(file: BinaryIO) -> Any:
    if _exactly(file, len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as a batch does")
    length = int.from_bytes(_exactly(file, 8), "little")
    body_size, sizes = msgpack.unpackb(_exactly(file, length))
    body = _exactly(file, body_size)
    buffers = [_exactly(file, size) for size in sizes]
    if file.read(1):
        raise ValueError("something follows the batch")
    return decode_bulk(body, buffers)


def _exactly(file: BinaryIO, size: int) -> bytearray:
    """So many bytes, which arrays may then be views of."""
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError("it is cut off")
    found = bytearray(size)
    if file.readinto(found) != size:  # type: ignore[attr-defined]
        raise ValueError("it is cut off")
    return found
