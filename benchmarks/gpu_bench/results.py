"""What stages find: one JSON line each, written at once. Pure but for the file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime_bench.report import number, table

FILE = "results.jsonl"


@dataclass(frozen=True)
class Row:
    """One finding. ``note``: what it hangs on, or why it is missing."""

    stage: str
    name: str
    value: float | str
    unit: str = ""
    note: str = ""


class Results:
    """Of one stage, in the output folder ``out``, which stages share."""

    def __init__(self, out: Path, stage: str) -> None:
        self.out = out
        self.stage = stage

    def add(self, name: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Write it down."""
        row = Row(self.stage, name, value, unit, note)
        with (self.out / FILE).open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{row.stage}: {row.name} = {row.value} {row.unit} {row.note}", flush=True)


def read_rows(out: Path) -> list[Row]:
    """All that was found; of what was found several times the last, at its first place."""
    path = out / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return list({(row.stage, row.name): row for row in (Row(**json.loads(line)) for line in lines)}.values())


def table_of(rows: Iterable[Row]) -> str:
    """Markdown."""
    return table(("stage", "what", "value", "note"), ((row.stage, row.name, _value(row), row.note) for row in rows))


def _value(row: Row) -> str:
    shown = row.value if isinstance(row.value, str) else number(row.value)
    return f"{shown} {row.unit}".strip()
