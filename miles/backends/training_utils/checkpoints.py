"""Committing a checkpoint: written aside, made durable, renamed; the tracker file last. All ranks succeed, or nothing
that was there before has changed.

``{save}/.iter_0000012.tmp`` is what is being written. ``{save}/iter_0000012`` is complete whenever it exists, and
``{save}/latest_checkpointed_iteration.txt`` names the newest that is. One that is saved again replaces the earlier one
of its name at once; where the file system cannot do that, a crash in between leaves ``{save}/.iter_0000012.old``, which
whoever looks for checkpoints puts back. The file ``rollout_state`` inside names the state of the rollout side that
belongs to it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from miles.backends.checkpoint_layout import TRACKER, iteration_name
from miles.backends.training_utils.collectives import all_gather_text
from miles.utils.replace_directory import put_back, put_in_place, recover_all
from miles.utils.rollout_state import mark_checkpoint
from miles_agents.errors import EnvironmentFault, MilesError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOTHING_LEFT = 1 << 20


class CannotSave(EnvironmentFault):
    """A checkpoint could not be written. Earlier ones are as they were."""

    code = "E-TRAIN-008"


def commit_checkpoint(root: Path, rollout_id: int, write: Callable[[Path], None], device: torch.device) -> Path:
    """Collective over all ranks: ``write(directory)`` on each, then the commit by rank 0.

    Args:
        root: ``--save``. All ranks see the same.
        rollout_id: Of the rollout whose training the checkpoint includes.
        write: Writes this rank's part into a directory that exists.
        device: That of collectives.

    Returns:
        The directory of the checkpoint.

    Raises:
        CannotSave: On all ranks alike, with what each rank saw.
    """
    name = iteration_name(rollout_id)
    final, aside = root / name, root / f".{name}.tmp"
    is_first = dist.get_rank() == 0
    steps: list[Callable[[], None]] = [
        (lambda: _begin(root, aside)) if is_first else _nothing,
        lambda: write(aside),
        (lambda: _make_durable(aside)) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else _nothing,
        (lambda: _publish(root, aside, final, rollout_id)) if is_first else _nothing,
    ]
    for step in steps:
        _all_or_none(step, final, aside, device)
    return final


def _all_or_none(step: Callable[[], None], final: Path, aside: Path, device: torch.device) -> None:
    """Do it on every rank; if it fails on any, clean up and raise on all."""
    own: BaseException | None = None
    try:
        step()
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - whatever a writer raises, all ranks must hear it
        own = _cause(error)
    told = all_gather_text("" if own is None else f"{int(_is_full(own, final.parent))}{_tell(own)}", device)
    failures = [f"rank {rank}: {text[1:]}" for rank, text in enumerate(told) if text]
    if not failures:
        return
    free = _free_bytes(final.parent)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    full = any(text.startswith("1") for text in told)
    repair = "Make room" if full else "Repair what the evidence names"
    raise CannotSave(
        f"checkpoint {final} could not be written" + (": the disk is full" if full else ""),
        evidence="\n".join([*failures, f"{free / (1 << 20):.1f} MiB were free on the disk of {final.parent}"]),
        advice=f"{repair}, then continue from the newest checkpoint with --load; those before are untouched.",
        directory=str(final),
    ) from own


def _begin(root: Path, aside: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    recover_all(root, "iter_*", clean_up=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def _make_durable(directory: Path) -> None:
    """Every file and directory below is on the disk. Nodes that see it over the network do it for their own caches."""
    for parent, _, names in os.walk(directory):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _publish(root: Path, aside: Path, final: Path, rollout_id: int) -> None:
    """From here on it counts. What has that name already (after a resume from further back) gives way."""
    mark_checkpoint(root, rollout_id, aside)
    replaced = put_in_place(aside, final)
    try:
        _sync(root)
        tracker = root / f".{TRACKER}.tmp"
        tracker.write_text(str(rollout_id))
        _sync(tracker)
        tracker.replace(root / TRACKER)
    except OSError:
        put_back(final, replaced, aside)
        raise
    _sync(root)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> BaseException:
    """Torch's own writer tells each rank of all that failed, with tracebacks: what the first of them raised."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _tell(error: BaseException) -> str:
    if isinstance(error, MilesError):
        text = f"{error.what}: {error.evidence}"
    else:
        text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 2000 else text[:1000] + " ... " + text[-1000:]


def _is_full(error: BaseException | None, root: Path) -> bool:
    """Said by the error or what caused it; or plain to see, since writers in C++ do not say why they failed."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return _free_bytes(root) < _NOTHING_LEFT


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return _NOTHING_LEFT


def _nothing() -> None:
    """What the other ranks do while one works."""
