"""Where checkpoints are, and whether all their files are there. Reads no tensor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from miles.backends.megatron_utils.errors import DamagedCheckpoint, NoSuchCheckpoint

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What the tracker says of weights that no training of ours made: those of ``miles convert``."""
FORMAT, COMMON, INDEX = "metadata.json", "common.pt", ".metadata"
"""Files of a torch_dist directory beside those with tensors; the first is written last."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A torch_dist directory. ``rollout_id``: None for a release."""

    directory: Path
    rollout_id: int | None


def iteration_name(rollout_id: int) -> str:
    """Of the directory of a rollout."""
    return f"iter_{rollout_id:07d}"


def find_checkpoint(root: str | Path | None, step: int | None = None) -> FoundCheckpoint | None:
    """The newest checkpoint below ``root``, or that of rollout ``step``; None if there is none.

    ``root`` may also be a torch_dist directory itself. A directory that the tracker does not name yet was never
    finished, and is no checkpoint.

    Raises:
        NoSuchCheckpoint: Not the one of ``step``.
        DamagedCheckpoint: The tracker names what is not there.
    """
    if root is None:
        return None
    root = Path(root)
    if step is not None:
        return _of_step(root, step)
    if (root / FORMAT).is_file():
        return FoundCheckpoint(root, _rollout_id(root.name))
    if not (root / TRACKER).is_file():
        return None
    said = (root / TRACKER).read_text().strip()
    name = said if said == RELEASE else iteration_name(int(said)) if said.isdigit() else ""
    if not name or not (root / name).is_dir():
        raise DamagedCheckpoint(
            f"{root / TRACKER} names a checkpoint that is not there",
            evidence=f"it says {said!r}; there are: {_there(root)}",
            advice="Write the number of a complete checkpoint into it, or choose one with --ckpt-step.",
            path=str(root),
        )
    return FoundCheckpoint(root / name, _rollout_id(name))


def _of_step(root: Path, step: int) -> FoundCheckpoint:
    directory = root / iteration_name(step)
    if not directory.is_dir():
        raise NoSuchCheckpoint(
            f"there is no checkpoint of rollout {step} in {root}",
            evidence=f"there are: {_there(root)}",
            advice="Choose one of these with --ckpt-step.",
            path=str(directory),
        )
    return FoundCheckpoint(directory, step)


def _there(root: Path) -> str:
    names = sorted(path.name for path in root.glob("iter_*")) if root.is_dir() else []
    return ", ".join(names) or "none"


def _rollout_id(name: str) -> int | None:
    match = re.fullmatch(r"iter_(\d{7,})", name)
    return int(match[1]) if match else None


def is_hf_directory(path: Path) -> bool:
    """Whether it looks like a Hugging Face model directory."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


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
