"""The journal of train batches: what was given to the trainer and may have to be trained on again. A file per rollout.

Consumes: the parts of a rollout as they went into the store. Produces: the same parts, as long as no checkpoint covers
them. Waits for: the disk. Invariants: a file that has its name is whole and on the disk (written aside, made durable,
renamed); it is written before the trainer hears of the rollout. No file is executed on reading: values are in the
runtime's own encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.rollout.messages import RolloutBatchRefs
from miles.rollout.saved_state import read_values, write_values
from miles_agents.errors import EnvironmentFault, MilesError

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
        write_values(self._path(rollout_id), _values(batch))

    def read(self, rollout_id: int) -> Batch:
        """Inverse of ``write``.

        Raises:
            DamagedBatch: It is not there, or not as it was written.
        """
        path = self._path(rollout_id)
        try:
            return _batch(iter(read_values(path)))
        except (OSError, ValueError, KeyError, TypeError, StopIteration, MilesError) as error:
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


def _values(batch: Batch) -> Iterator[Any]:
    """A head, then each column by itself: a value may have 256 MiB, and a rollout has more."""
    yield {"version": 1, "answer": batch.answer, "columns": [list(part) for part in batch.parts]}
    for part in batch.parts:
        yield from part.values()


def _batch(values: Iterator[Any]) -> Batch:
    head: Mapping[str, Any] = next(values)
    parts = [{name: next(values) for name in names} for names in head["columns"]]
    return Batch(head["answer"], parts)
