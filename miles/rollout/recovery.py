"""What the rollout manager keeps in the run directory, so that its successor goes on where it was, and ranks of the
trainer that begin anew can be trained as those before them (``--use-fault-tolerance``).

For each rollout that is given to the trainer, in this order: the batch (``batch_journal``), then a state: data
position, buffer, ledger, counters, generators, all of one moment (``TrackedDataSource.cut``). A batch counts if a state
of its rollout, or of a later one, is there. So, wherever the manager dies:

* before the state of rollout R is there: rollout R was never told of. The state before it is restored: groups that were
  taken since are in the data source or the buffer as they were, and are generated again.
* after that: rollout R is in the ledger as selected, and asking for it again gives the batch that was written.

So each group that is trained on is trained on once. What is done twice is generation only.

Consumes: batches and calls of the rollout manager. Produces: files, the same batches, a restored source. Waits for: the
disk, a data source's ``save`` and ``load``. Invariants: the newest state is whole; the trainer hears of a rollout only
when both its files are on the disk.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from miles.rollout import manager_state
from miles.rollout.batch_journal import Batch, BatchJournal
from miles.rollout.tracked_source import TrackedDataSource
from miles_agents.errors import EnvironmentFault

_NAME = re.compile(r"state_(-?\d+)")


class NoStateKept(EnvironmentFault):
    """A rollout manager that died cannot be brought back: the run directory has no state of it."""

    code = "E-REC-004"


class RolloutRecovery:
    """See the module's docstring. Coroutines run on the loop of user code: the data source may be the user's.

    Args:
        directory: Of this run, for recovery alone.
    """

    def __init__(self, args: Namespace, source: TrackedDataSource, directory: Path) -> None:
        self.args = args
        self.source = source
        self.batches = BatchJournal(directory / "batches")
        self.states = directory / "rollout"
        self._restored: set[int] = set()

    async def begin(self, counters: dict[str, Any], rollout_id: int) -> None:
        """A run begins, or goes on after this rollout: nothing of before counts, and there is a first state.

        Raises:
            CannotSave, NotSavable, HookFailed.
        """
        for directory in (self.batches.directory, self.states):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        await self._write_state(counters, rollout_id)

    async def shipped(self, counters: dict[str, Any], rollout_id: int, batch: Batch) -> None:
        """A rollout's groups are selected, and its batch is in the store: both files, durable on return.

        Raises:
            CannotSave, NotSavable, HookFailed: The trainer must not hear of the rollout.
        """
        await asyncio.to_thread(self.batches.write, rollout_id, batch)
        await self._write_state(counters, rollout_id)

    async def restore(self, trained: int) -> dict[str, Any]:
        """The newest state; returns its counters. ``trained``: the last rollout that was trained on.

        Raises:
            NoStateKept: There is none, or not of a rollout that was trained on.
        """
        newest = self.newest_state()
        if newest is None or newest < trained:
            raise NoStateKept(
                "the rollout manager cannot be brought back",
                evidence=f"rollout {trained} was trained on; the newest state in {self.states} is "
                f"{'none' if newest is None else f'that after rollout {newest}'}",
                advice="Somebody removed files of the run directory; start again from the newest checkpoint.",
            )
        await asyncio.to_thread(self.batches.remove_after, newest)
        counters = await manager_state.read_state(self.args, self.source, newest, self._state(newest))
        for rollout_id in sorted(set(self.source.ledger.open.values())):
            if rollout_id <= trained:
                self.source.trained(rollout_id)
        self._restored = {rollout_id for rollout_id in self.batches.rollouts() if rollout_id > trained}
        self.source.is_under_way(max(self._restored, default=None))
        return counters

    async def again(self, rollout_id: int) -> Batch | None:
        """The batch of a rollout that the manager before this one had made and that is not trained on; None: it had
        not. Raises DamagedBatch."""
        if rollout_id not in self._restored:
            return None
        return await asyncio.to_thread(self.batches.read, rollout_id)

    def newest_state(self) -> int | None:
        """Rollout after which it was; None: there is none."""
        return max(
            (int(match[1]) for path in self.states.glob("state_*") if (match := _NAME.fullmatch(path.name))),
            default=None,
        )

    async def _write_state(self, counters: dict[str, Any], rollout_id: int) -> None:
        path = self._state(rollout_id)
        await manager_state.write_state(self.args, self.source, counters, rollout_id, path)
        await asyncio.to_thread(self._remove_older, path)

    def _remove_older(self, newest: Path) -> None:
        for path in self.states.glob("state_*"):
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)

    def _state(self, rollout_id: int) -> Path:
        return self.states / f"state_{rollout_id}"
