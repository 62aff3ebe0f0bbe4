"""What a prompt file says before it is loaded: rows, columns, the first broken line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

READ_BYTES = 64 * 1024 * 1024
"""So much of a JSONL file is parsed; what follows is only counted (the loader reads it all anyway)."""

_SLICE = re.compile(r"(.*)@\[(-?\d*):(-?\d*)\]")


@dataclass(frozen=True)
class DataFacts:
    """A file of prompts.

    Attributes:
        error: Why it cannot be read; empty: it can.
        rows: Rows in the slice, or in all of it. Nothing else is told of what lies outside.
        columns: Of its first row.
        absent: Of the columns that were asked for, those that some row of it lacks: the number of the first such line.
        broken: Number of its first line that is not a JSON object, and what is wrong with it.
    """

    error: str = ""
    rows: int = 0
    columns: tuple[str, ...] = ()
    absent: dict[str, int] = field(default_factory=dict)
    broken: tuple[int, str] | None = None


def split_slice(path: str) -> tuple[str, slice]:
    """``PATH@[a:b]`` is rows ``a`` to ``b`` (excluded) of ``PATH``."""
    match = _SLICE.fullmatch(path)
    if not match:
        return path, slice(None)
    start, stop = (int(part) if part not in {"", "-"} else None for part in match.groups()[1:])
    return match[1], slice(start, stop)


def read_data(path: str, keys: Sequence[str]) -> DataFacts:
    """Look at a file. ``keys``: columns whose absence is to be told."""
    name, rows = split_slice(path)
    file = Path(name)
    if not file.is_file():
        return DataFacts(error="is a directory, not a file" if file.is_dir() else "does not exist")
    try:
        if file.suffix == ".parquet":
            return _parquet(file, keys, rows)
        with file.open("rb") as lines:
            return _jsonl(lines, keys, rows)
    except OSError as error:
        return DataFacts(error=f"cannot be read: {error}")


def _jsonl(file: BinaryIO, keys: Sequence[str], rows: slice) -> DataFacts:
    start, stop = _bounds(file, rows)
    columns: tuple[str, ...] = ()
    absent: dict[str, int] = {}
    index = size = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if index >= stop:
            break
        if index >= start and size <= READ_BYTES:
            row = _row(line)
            if isinstance(row, str):
                return DataFacts(rows=index - start, columns=columns, absent=absent, broken=(number, row))
            columns = columns or tuple(row)
            for key in keys:
                if key not in row:
                    absent.setdefault(key, number)
            size += len(line)
        index += 1
    return DataFacts(rows=max(0, index - start), columns=columns, absent=absent)


def _bounds(file: BinaryIO, rows: slice) -> tuple[int, float]:
    """First row and the one behind the last. Those that are counted from the end need all rows to be counted first."""
    if (rows.start or 0) >= 0 and (rows.stop or 0) >= 0:
        return rows.start or 0, math.inf if rows.stop is None else rows.stop
    start, stop, _ = rows.indices(sum(1 for line in file if line.strip()))
    file.seek(0)
    return start, stop


def _row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return str(error)
    return row if isinstance(row, dict) else f"a JSON object is needed, this is {type(row).__name__}"


def _parquet(file: Path, keys: Sequence[str], rows: slice) -> DataFacts:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        return DataFacts(error="is a Parquet file, and pyarrow is not installed: pip install pyarrow, or use JSONL")
    try:
        with ParquetFile(file) as table:
            columns = tuple(table.schema_arrow.names)
            count = table.metadata.num_rows
    except ArrowException as error:
        return DataFacts(error=f"cannot be read: {error}")
    return DataFacts(
        rows=len(range(count)[rows]), columns=columns, absent={key: 1 for key in keys if key not in columns}
    )
