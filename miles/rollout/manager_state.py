"""Saving and loading what the rollout manager has beside the data source: groups under way, ledger, counters.

A save has three steps, of which the trainer does the second:

1. ``save`` writes everything below ``{directory}/rollout/.pending_{id}``, which gets its name when it is complete. Data
   sources write below ``args.save``, which is that directory meanwhile. Each state has a token of its own.
2. The trainer publishes ``{directory}/iter_{id}`` with the token inside.
3. ``commit`` puts the files where they are kept: ``{directory}/rollout/rollout_manager_{id}.msgpack`` and what the data
   source wrote. Each is linked or copied and replaces what had its name; only then is the pending directory removed.

``load`` takes the pending state if its token is the checkpoint's, else what is kept. So, wherever a crash comes:

* before step 2: the checkpoint of this id is absent or the earlier one, which has another token. What is kept for the
  earlier one was not touched, and counts. The next ``save`` removes the pending state.
* after step 2, before or within step 3: the tokens agree. The pending state is whole, as nothing is taken out of it;
  it counts, however mixed what is kept is by then. The next ``save`` completes the commit before it does anything.
* after step 3: the pending directory is gone, or has lost its name, and what is kept is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from miles.rollout.base_types import Group
from miles.rollout.hooks import Hook, hook_pool
from miles.rollout.saved_state import cannot_save, group_from_plain, plain_group, read_values, write_values
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.rollout_state import (
    STATE_MARK,
    checkpoint_token,
    is_published,
    pending_directory,
    pending_states,
    pending_token,
    sync,
)

logger = logging.getLogger(__name__)
Take: TypeAlias = Callable[[], tuple[dict[str, Any], list[Group]]]
_VERSION = 1


def state_path(directory: Path, rollout_id: int) -> Path:
    """Where the state after a rollout is."""
    return directory / "rollout" / f"rollout_manager_{rollout_id}.msgpack"


async def save(
    args: Namespace, source: TrackedDataSource, counters: dict[str, Any], rollout_id: int, directory: Path
) -> None:
    """Step 1. Runs on the loop of user code: the data source may be the user's.

    Raises:
        CannotSave, NotSavable, HookFailed: What was kept before is as it was.
    """
    pending = pending_directory(directory, rollout_id)
    aside = pending.with_name(pending.name + ".tmp")
    try:
        await asyncio.to_thread(_begin, directory, aside)
        token = uuid.uuid4().hex
        head = {"rollout_id": rollout_id, "counters": counters, "token": token}
        await _write(args, source, head, aside, source.checkpoint)
        await asyncio.to_thread(_end, aside, pending, token)
    except OSError as error:
        raise cannot_save(pending, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


async def write_state(
    args: Namespace, source: TrackedDataSource, counters: dict[str, Any], rollout_id: int, path: Path
) -> None:
    """A state by itself, of no checkpoint, with groups that are selected kept so. ``path`` is a directory that is whole
    whenever it has its name; one that is there is replaced.

    Raises:
        CannotSave, NotSavable, HookFailed: What has that name is as it was.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        aside.mkdir(parents=True)
        await _write(args, source, {"rollout_id": rollout_id, "counters": counters}, aside, source.snapshot)
        await asyncio.to_thread(_publish, aside, path)
    except OSError as error:
        raise cannot_save(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


async def read_state(args: Namespace, source: TrackedDataSource, rollout_id: int, path: Path) -> dict[str, Any]:
    """Inverse of ``write_state``; returns the counters. Raises HookFailed, and what reading raises."""
    return await _read(args, source, rollout_id, path)


async def _write(args: Namespace, source: TrackedDataSource, head: dict[str, Any], directory: Path, take: Take) -> None:
    """The data source's own files and ours, all of one moment. ``head`` has the rollout, and what else there is."""
    rollout_id: int = head["rollout_id"]
    hook = _source_hook(args, source.inner.save)
    async with source.saving:  # ``args.save`` is one for all
        before, vars(args)["save"] = getattr(args, "save", None), str(directory)
        try:
            if hook.is_async:
                await hook(rollout_id)
            # In a thread: whoever holds the data source at this moment may need the loop to let go of it.
            save = _done if hook.is_async else partial(hook.call, rollout_id)
            # The generators inside of it: taking groups may draw from them.
            cut = partial(source.cut, save, lambda: (*take(), _random_states()))
            plain, groups, generators = await asyncio.get_running_loop().run_in_executor(hook_pool(), cut)
        finally:
            vars(args)["save"] = before
    values = {"version": _VERSION, "source": plain, "random": generators, **head}
    await asyncio.to_thread(write_values, state_path(directory, rollout_id), [values, *map(plain_group, groups)])


def _done() -> None:
    """Nothing is left to do."""


def _publish(aside: Path, path: Path) -> None:
    _make_durable(aside)
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    sync(path.parent)


def _begin(directory: Path, aside: Path) -> None:
    """Pending states of before are committed or removed, and there is a new directory."""
    for rollout_id in list(pending_states(directory)):
        if is_published(directory, rollout_id):
            commit(rollout_id, directory)
        else:
            shutil.rmtree(pending_directory(directory, rollout_id))
    for left in aside.parent.glob(".pending_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)


def _end(aside: Path, pending: Path, token: str) -> None:
    (aside / STATE_MARK).write_text(token)
    _make_durable(aside)
    aside.rename(pending)
    sync(pending.parent)


def _make_durable(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


def commit(rollout_id: int, directory: Path) -> None:
    """Step 3, once the trainer has published its checkpoint. Nothing is done if nothing is pending.

    Raises:
        CannotSave: ``load`` finds the state nevertheless.
    """
    try:
        for _ in commit_steps(rollout_id, directory):
            pass
    except OSError as error:
        raise cannot_save(state_path(directory, rollout_id), error) from error


def commit_steps(rollout_id: int, directory: Path) -> Iterator[str]:
    """The commit, a change on the disk at a time; what was done is yielded."""
    pending = pending_directory(directory, rollout_id)
    if pending_token(directory, rollout_id) is None:
        return
    changed = set()
    for parent, _, names in os.walk(pending):
        target = directory / Path(parent).relative_to(pending)
        target.mkdir(parents=True, exist_ok=True)
        changed.add(target)
        for name in sorted(names):
            if (Path(parent), name) != (pending, STATE_MARK):
                _place(Path(parent) / name, target / name)
                yield f"placed {target / name}"
    for target in changed:
        sync(target)
    gone = pending.with_name(pending.name + ".tmp")
    shutil.rmtree(gone, ignore_errors=True)
    pending.rename(gone)
    yield "given up the pending directory"
    shutil.rmtree(gone, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    """``target`` is the content of ``source``, which stays; at no time is it anything else than old or new."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.aside")
    aside.unlink(missing_ok=True)
    try:
        try:
            aside.hardlink_to(source)
        except OSError:  # not everywhere
            shutil.copyfile(source, aside)
            sync(aside)
        aside.replace(target)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # names of one file do not replace each other


async def load(args: Namespace, source: TrackedDataSource, rollout_id: int, directory: Path) -> dict[str, Any] | None:
    """Read it into the source; the counters. None if there is no state of this rollout.

    A directory of the reference system has the data position only; then that is loaded.
    """
    base = pending_directory(directory, rollout_id) if is_published(directory, rollout_id) else directory
    path = state_path(base, rollout_id)
    position = path.with_name(f"global_dataset_state_dict_{rollout_id}.pt")
    if not path.exists() and not position.exists():
        return None
    head: dict[str, Any] = next(read_values(path), {}) if path.exists() else {}
    made_for, token = head.get("token"), checkpoint_token(directory, rollout_id)
    if made_for and token and made_for != token:
        logger.warning("%s was not made with the checkpoint of rollout %d, and does not count", path, rollout_id)
        return None
    return await _read(args, source, rollout_id, base)


async def _read(args: Namespace, source: TrackedDataSource, rollout_id: int, base: Path) -> dict[str, Any]:
    before, vars(args)["load"] = getattr(args, "load", None), str(base)
    try:
        await _source_hook(args, source.inner.load)(rollout_id)
    finally:
        vars(args)["load"] = before
    path = state_path(base, rollout_id)
    values = read_values(path) if path.exists() else iter(())
    head: dict[str, Any] = next(values, {})
    if not head:
        return {}
    source.restore(head["source"], map(group_from_plain, values))
    if "random" in head:
        _restore_random_states(head["random"])
    counters: dict[str, Any] = head["counters"]
    return counters


def _random_states() -> dict[str, Any]:
    """Of the generators that rewards (``--rm-type random``) and user code of this process draw from."""
    version, state, gauss = random.getstate()
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {"python": [version, list(state), gauss], "numpy": [name, keys.tolist(), *rest]}


def _restore_random_states(plain: dict[str, Any]) -> None:
    version, state, gauss = plain["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, *rest = plain["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def _source_hook(args: Namespace, method: Any) -> Hook:
    return Hook("--data-source-path", str(args.data_source_path), method, may_block=True)
