"""What trackers remember, so that a resumed run goes on with the same curves: ``trackers.json`` in the run directory,
and beside the checkpoints in ``--save``, because a resumed run may have another run directory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

FILE_NAME = "trackers.json"
Remembered: TypeAlias = dict[str, dict[str, Any]]
"""By tracker."""


def read_remembered(directories: Iterable[Path]) -> Remembered:
    """Of the first of these directories that has the file; nothing if none has, or it cannot be read."""
    for directory in directories:
        try:
            found = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return {str(name): entry for name, entry in found.items() if isinstance(entry, dict)}
    return {}


def write_remembered(directory: Path, remembered: Remembered) -> None:
    """Write the file, whole or not at all. A disk that does not take it costs nothing but the continuation."""
    aside = directory / f".{FILE_NAME}.{os.getpid()}"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(remembered, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        aside.replace(directory / FILE_NAME)


def places(load: str | None, run_dir: str) -> list[Path]:
    """Where a resumed run looks: beside the checkpoint that it loads (``--load`` may be one itself), then at home."""
    beside = [] if not load else [Path(load), Path(load).parent]
    return [*beside, Path(run_dir)]
