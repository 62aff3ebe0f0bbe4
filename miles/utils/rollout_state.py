"""Which rollout state belongs to which checkpoint: the token that ties the two, and where both are.

The rollout manager writes the state after rollout 12 into ``{save}/rollout/.pending_12/``, with a token that no other
state has. The trainer puts the token into its checkpoint before that gets its name. So a state counts if, and only if,
the checkpoint that it was made for was published. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from miles.backends.checkpoint_layout import iteration_name

STATE_MARK = "token"
"""File of a pending state, written last."""
CHECKPOINT_MARK = "rollout_state"
"""File of a checkpoint."""
_NAME = re.compile(r"\.pending_(\d+)")


def pending_directory(root: Path, rollout_id: int) -> Path:
    """Of a state that is complete, and whose checkpoint may be published or not. What is inside mirrors ``root``."""
    return root / "rollout" / f".pending_{rollout_id}"


def pending_states(root: Path) -> Iterator[int]:
    """Rollouts of all pending states."""
    for path in sorted((root / "rollout").glob(".pending_*")):
        if match := _NAME.fullmatch(path.name):
            yield int(match[1])


def pending_token(root: Path, rollout_id: int) -> str | None:
    """None: there is no pending state of this rollout."""
    return _read(pending_directory(root, rollout_id) / STATE_MARK)


def checkpoint_token(root: Path, rollout_id: int) -> str | None:
    """None: there is no checkpoint of this rollout, or it was made without a rollout state."""
    return _read(root / iteration_name(rollout_id) / CHECKPOINT_MARK)


def is_published(root: Path, rollout_id: int) -> bool:
    """Whether the checkpoint that the pending state was made for has its name."""
    token = pending_token(root, rollout_id)
    return token is not None and token == checkpoint_token(root, rollout_id)


def mark_checkpoint(root: Path, rollout_id: int, directory: Path) -> None:
    """Put the token into a checkpoint that is not published yet, durably; nothing if no state is pending."""
    token = pending_token(root, rollout_id)
    if token is None:
        return
    path = directory / CHECKPOINT_MARK
    path.write_text(token)
    for place in (path, directory):
        sync(place)


def sync(path: Path) -> None:
    """A file's or directory's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
