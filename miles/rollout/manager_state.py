"""Saving and loading what the rollout manager has beside the data source: groups under way, ledger, counters.

``{directory}/rollout/rollout_manager_{rollout_id}.msgpack`` is written last: where it is, all of the state is.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import Any

from miles.rollout.hooks import Hook
from miles.rollout.saved_state import group_from_plain, plain_group, read_values, write_values
from miles.rollout.tracked_source import TrackedDataSource

_VERSION = 1


def state_path(directory: Path, rollout_id: int) -> Path:
    """Where the state after a rollout is."""
    return directory / "rollout" / f"rollout_manager_{rollout_id}.msgpack"


async def save(
    args: Namespace, source: TrackedDataSource, counters: dict[str, Any], rollout_id: int, directory: Path
) -> None:
    """Write it. Runs on the loop of user code: the data source may be the user's.

    Raises:
        CannotSave, NotSavable, HookFailed.
    """
    vars(args)["save"] = str(directory)
    await _source_hook(args, source.inner.save)(rollout_id)
    plain, groups = source.checkpoint()
    head = {"version": _VERSION, "rollout_id": rollout_id, "source": plain, "counters": counters}
    await asyncio.to_thread(write_values, state_path(directory, rollout_id), [head, *map(plain_group, groups)])


async def load(args: Namespace, source: TrackedDataSource, rollout_id: int, directory: Path) -> dict[str, Any] | None:
    """Read it into the source; the counters. None if there is no state of this rollout.

    A directory of the reference system has the data position only; then that is loaded.
    """
    path = state_path(directory, rollout_id)
    position = path.with_name(f"global_dataset_state_dict_{rollout_id}.pt")
    if not path.exists() and not position.exists():
        return None
    vars(args)["load"] = str(directory)
    await _source_hook(args, source.inner.load)(rollout_id)
    if not path.exists():
        return {}
    values = read_values(path)
    head = next(values)
    source.restore(head["source"], map(group_from_plain, values))
    counters: dict[str, Any] = head["counters"]
    return counters


def _source_hook(args: Namespace, method: Any) -> Hook:
    return Hook("--data-source-path", str(args.data_source_path), method, may_block=True)
