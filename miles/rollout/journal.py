"""The journal of the rollout ledger: every transition, one JSON line each, in ``{run_dir}/journal/rollout.jsonl``.

Each line is written to the kernel at once, so that it survives the death of the process; ``sync`` makes the lines so
far survive the machine, and is called when a rollout is complete and when it is trained. A line that was cut off by
a crash is left out on reading, and removed before the next one is written. A line of kind ``state`` holds a whole
ledger: the first line, and one after each restored checkpoint; what stands before it does not count any more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles.rollout.ledger import Ledger, Transition
from miles_agents.errors import EnvironmentFault


class DamagedJournal(EnvironmentFault):
    """A journal holds a line that is none, before its end."""

    code = "E-ROLL-005"


class Journal:
    """Appends to a file. One writer per file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _drop_torn_line(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def state(self, ledger: Ledger, note: str) -> None:
        """The ledger as a whole; durable on return."""
        self._write([{"kind": "state", "note": note, "ledger": ledger.to_plain()}])
        self.sync()

    def append(self, steps: Iterable[Transition]) -> None:
        """Transitions that were applied."""
        self._write([asdict(step) for step in steps])

    def sync(self) -> None:
        """Make all lines so far survive a crash of the machine."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Durable, and given back."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if lines:
            data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
            while data:
                data = data[os.write(self._fd, data) :]


def replay(path: Path) -> Ledger:
    """The ledger that a journal leads to; an empty one if there is no file.

    Raises:
        DamagedJournal: A line before the last one is no transition.
    """
    ledger = Ledger()
    if not path.exists():
        return ledger
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                continue  # torn by a crash
            raise _damaged(path, number, line) from error
        if values["kind"] == "state":
            ledger = Ledger.from_plain(values["ledger"])
        else:
            ledger.apply(Transition(**values))
    return ledger


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _damaged(path: Path, number: int, line: bytes) -> DamagedJournal:
    return DamagedJournal(
        f"{path}, line {number} is no line of a journal",
        evidence=line[:200].decode(errors="replace"),
        advice="Move the file away, and start again from a checkpoint.",
    )
