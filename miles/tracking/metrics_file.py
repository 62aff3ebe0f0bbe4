"""``metrics.jsonl``: a line for each iteration and each evaluation, and, where iterations have several, for each
optimizer step. Always written, whatever else tracks the run.

Fields of a line: ``event`` (``rollout``, ``eval`` or ``step``), ``rollout_id``, ``rollouts_done`` (iterations that the
weights have seen), ``time`` (seconds since the epoch), and the metrics by their names (``rollout/...``, ``train/...``,
``perf/...``, ``eval/...``; docs/metrics.md has them all). A number that is not finite is null.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from miles.tracking.tracker import EVAL_AXIS
from miles_agents.run_files import UnusableRunDirectory

logger = logging.getLogger(__name__)
FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends lines; each is on disk (as far as a crash of this process goes) when ``write`` returns.

    A disk that is full ends no run: what could not be written is told once, by ``say``, and waits for the next write.

    Raises:
        UnusableRunDirectory: The file cannot be opened.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = logger.warning) -> None:
        self.path = run_dir / FILE_NAME
        self._say = say
        self._has_told = False
        try:
            self._file = self.path.open("ab", buffering=0)
            self._waiting = b"" if _ends_with_a_whole_line(self.path) else b"\n"
        except OSError as error:
            raise UnusableRunDirectory.because(self.path, error) from None

    def write(self, event: str, rollout_id: int, rollouts_done: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        head: dict[str, Any] = {
            "event": event, "rollout_id": rollout_id, "rollouts_done": rollouts_done, "time": time.time(),
        }  # fmt: skip
        line = json.dumps({**head, **{name: _plain(value) for name, value in metrics.items()}})
        self._waiting += line.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._has_told:
                self._has_told = True
                self._say(
                    f"{self.path} cannot be written: {error}. The run goes on; make room, and it is written later"
                )

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the run as it stands: what a resumed run did anew takes the place of what had been done before. A
    last line that a crash has torn is left out."""
    rows: dict[tuple[int, str, float | None], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        done = row["rollouts_done"]
        while rows and next(reversed(rows))[0] > done:
            rows.popitem()
        rows.pop(_place(row), None)
        rows[_place(row)] = row
    return list(rows.values())


def _place(row: Mapping[str, Any]) -> tuple[int, str, float | None]:
    """Of what there is one line."""
    return row["rollouts_done"], row["event"], row.get("train/step") if row["event"] == "step" else None


def _ends_with_a_whole_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size == 0 or file.read(1) == b"\n"


def _plain(value: float) -> float | int | str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def eval_means(names: Iterable[str]) -> list[str]:
    """Of the metrics of an evaluation the mean rewards, ``eval/NAME`` by set: not the trackers' axis, and not what else
    is told of a set (``eval/NAME-truncated_ratio``). A set's own name may have hyphens."""
    flat = [name for name in names if name.startswith("eval/") and name.count("/") == 1 and name != EVAL_AXIS]
    return [name for name in flat if not any(name.startswith(f"{other}-") for other in flat)]
