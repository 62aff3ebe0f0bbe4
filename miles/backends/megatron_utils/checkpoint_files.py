"""Whether all files of a torch_dist checkpoint are there. Reads no tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from miles.backends.checkpoint_layout import FORMAT, DamagedCheckpoint

COMMON, INDEX = "common.pt", ".metadata"
"""Files of a torch_dist directory beside those with tensors."""


def check_complete(directory: Path) -> Metadata:
    """Its index of tensors, once it is known that all of them are there.

    Raises:
        DamagedCheckpoint: Files are missing or too short. All are named.
    """
    missing = [name for name in (FORMAT, COMMON, INDEX) if not (directory / name).is_file()]
    if missing:
        raise _damaged(directory, f"missing: {', '.join(missing)}")
    try:
        made_by = json.loads((directory / FORMAT).read_text()).get("sharded_backend")
        index = FileSystemReader(directory).read_metadata()
    except Exception as error:  # a damaged pickle raises anything
        raise _damaged(directory, f"{FORMAT} or {INDEX}: {type(error).__name__}: {error}") from error
    if made_by != "torch_dist":
        raise _damaged(directory, f"{FORMAT} says that it was made by {made_by!r}, not torch_dist")
    if wrong := _wrong_files(directory, index):
        raise _damaged(directory, "; ".join(wrong))
    return index


def _wrong_files(directory: Path, index: Metadata) -> list[str]:
    ends: dict[str, int] = {}
    entries: dict[Any, Any] = index.storage_data
    for entry in entries.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    wrong = []
    for name, end in sorted(ends.items()):
        path = directory / name
        if not path.is_file():
            wrong.append(f"missing: {name}")
        elif path.stat().st_size < end:
            wrong.append(f"too short: {name} has {path.stat().st_size} bytes of {end}")
    return wrong


def _damaged(directory: Path, evidence: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"the checkpoint {directory} is damaged or incomplete",
        evidence=evidence,
        advice="Load an earlier one with --ckpt-step, or restore the files.",
        path=str(directory),
    )
