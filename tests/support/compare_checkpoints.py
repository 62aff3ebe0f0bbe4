"""``python compare_checkpoints.py A B``: prints the names of what differs between two sharded checkpoints, one a line,
and last how many there are in all. A process of its own, as torch leaves threads behind."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys


def tensors_of(checkpoint: Path) -> dict[str, object]:
    """Everything in it, flat, by name."""
    found: dict[str, object] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                walk(one, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for key, one in enumerate(value):
                walk(one, f"{name}.{key}")
        else:
            found[name] = value

    directory = checkpoint if (checkpoint / ".metadata").exists() else next(checkpoint.rglob(".metadata")).parent
    walk(_load_state_dict_from_keys(storage_reader=FileSystemReader(directory)), "")
    return found


def same(ours: object, theirs: object) -> bool:
    """Bit for bit, for tensors."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    return str(ours) == str(theirs)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that there is no process group is meant so
    first, second = (tensors_of(Path(path)) for path in sys.argv[1:])
    for key in sorted(first.keys() | second.keys()):
        if key not in first or key not in second or not same(first[key], second[key]):
            sys.stdout.write(key + "\n")
    sys.stdout.write(f"{len(first)}\n")
