"""Paths that break in the middle of a run if nobody looks at them before: what is written, and what is read late."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from miles.backends.checkpoint_layout import EXPORTED

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "save_debug_rollout_data": ("rollout_id",),
    "load_debug_rollout_data": ("rollout_id",),
    "save_debug_train_data": ("rollout_id", "rank"),
    "save_debug_trajectory_data": ("rollout_id",),
}
"""What can stand in braces, by dest."""
_OF_EVALUATIONS = ("save_debug_rollout_data", "save_debug_trajectory_data")


def path_errors(values: Mapping[str, Any], run_dir: str) -> dict[str, str]:
    """Why files cannot be written or read, by dest. ``run_dir``: where a run without ``--run-dir`` writes."""
    found = {}
    for dest, fields in TEMPLATES.items():
        if template := values.get(dest):
            evaluates = dest in _OF_EVALUATIONS and values.get("eval_interval") is not None
            found[dest] = _why_not_filled(template, fields, "eval_0" if evaluates else 0) or (
                _why_not_there(template) if dest.startswith("load_") else _why_no_file(_filled(template, fields, 0))
            )
    if sentinel := values.get("save_trigger_sentinel"):
        found["save_trigger_sentinel"] = _why_no_file(Path(sentinel))
    if values.get("record_memory_history"):
        directory = Path(values.get("run_dir") or run_dir, values.get("memory_snapshot_dir") or ".")
        found["memory_snapshot_dir"] = why_unwritable(directory)
    return {dest: why for dest, why in found.items() if why}


def _filled(template: str, fields: tuple[str, ...], rollout_id: int | str) -> Path:
    return Path(template.format(**{**dict.fromkeys(fields, 0), "rollout_id": rollout_id}))


def _why_not_filled(template: str, fields: tuple[str, ...], rollout_id: int | str) -> str:
    """``rollout_id`` is a text for evaluations, which numbers' formats do not take."""
    allowed = " and ".join(f"{{{field}}}" for field in fields)
    for one in dict.fromkeys((0, rollout_id)):
        try:
            _filled(template, fields, one)
        except (LookupError, ValueError, AttributeError) as error:
            what = f"rollout_id is {one!r} for evaluations" if one else f"only {allowed} can stand in braces"
            return f"{what}: {type(error).__name__}: {error}"
    return ""


def _why_not_there(template: str) -> str:
    """No rollout's file is there."""
    pattern = "".join(
        glob.escape(text) + ("" if field is None else "*") for text, field, _, _ in Formatter().parse(template)
    )
    return "" if any(Path(path).is_file() for path in glob.iglob(pattern)) else f"there is no file {template}"


def _why_no_file(path: Path) -> str:
    return f"{path} is a directory" if path.is_dir() else why_unwritable(path.absolute().parent)


def why_unwritable(path: Path) -> str:
    """Why files cannot be written below ``path``, which need not exist; empty: they can."""
    nearest = path.absolute()
    while not nearest.exists():
        if nearest.is_symlink():
            return f"{nearest} is a link to nowhere"
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not writable for user {os.getuid()}"


def why_not_exported(template: str) -> str:
    """Why ``--save-hf`` cannot be written: what an export at the end of training would run into. Empty: it can."""
    if not template:
        return ""
    try:
        path = Path(template.format(rollout_id=0))
    except (LookupError, ValueError, AttributeError) as error:
        return f"only {{rollout_id}} can stand in braces: {type(error).__name__}: {error}"
    is_ours = (path / EXPORTED).is_file()
    if str(path) == template and path.exists() and not is_ours and (not path.is_dir() or any(path.iterdir())):
        return f"there is something already, and no earlier export of ours: it has no {EXPORTED} file"
    return why_unwritable(path.absolute().parent)
