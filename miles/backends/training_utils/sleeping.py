"""Memory of a trainer while engines have the machine: what is put away, how deep the sleep is, and everything back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from miles.backends.training_utils.storages import Dropped, Kept, Storage, keep, return_memory
from miles_agents.errors import InternalError


class Asleep(InternalError):
    """Something was asked for whose memory ``sleep`` has put away."""

    code = "E-TRAIN-016"


class SleepingMemory:
    """``--offload-train-target``, ``--offload-train-disk-dir`` and ``--offload-train-disk-chunk-mb`` at work.
    ``level``: 0, nothing is away; 1, gradients and the optimizer's state; 2, parameters, too."""

    def __init__(self, args: Any) -> None:
        self.level = 0
        self._target = getattr(args, "offload_train_target", None) or "cpu"
        directory = getattr(args, "offload_train_disk_dir", None)
        self._directory = Path(directory or Path(getattr(args, "run_dir", None) or ".") / "offload")
        self._chunk = (getattr(args, "offload_train_disk_chunk_mb", None) or 256) << 20
        self._away: list[Dropped | Kept] = []

    def put_away(self, storages: list[Storage]) -> None:
        """They lose their memory, which must not be touched until ``wake_up``.

        Raises:
            CannotSleep: The disk is full, or does not work. They have their memory then.
        """
        kept = keep(storages, target=self._target, directory=self._directory, chunk_bytes=self._chunk)
        if kept is not None:
            self._away.append(kept)

    def drop(self, storages: list[Storage]) -> None:
        """The same, but their content is not kept."""
        self._away.append(Dropped(storages))

    def give_back(self) -> None:
        """What was freed goes to the system, or to whoever else uses the device."""
        return_memory()

    def wake_up(self) -> None:
        """Everything is as it was before.

        Raises:
            CannotSleep: A file cannot be read. The state is lost then.
        """
        with torch.no_grad():
            while self._away:
                self._away[-1].restore()
                self._away.pop()
        self.level = 0

    def close(self) -> None:
        """Give files back; what is asleep is lost."""
        for part in self._away:
            part.close()
        self._away.clear()

    def check_awake(self, what: str, *, level: int = 1) -> None:
        """Emptied memory must not be touched.

        Raises:
            Asleep: At ``level``, or deeper.
        """
        if self.level >= level:
            raise Asleep(
                f"cannot {what} while asleep at level {self.level}",
                evidence="its memory has been put away by sleep()",
                advice="Call wake_up() first.",
                level=self.level,
            )


def without(storages: list[Storage], others: Iterable[Storage]) -> list[Storage]:
    """Those that are not among the others."""
    known = {storage._cdata for storage in others}
    return [storage for storage in storages if storage._cdata not in known]
