"""What a prompt file says before it is loaded: rows, columns, the first broken line. All of its slice is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from miles.utils.prompt_columns import Columns, Fault, without_nulls
from miles.utils.prompt_files import (
    EmptyDataset,
    buffered,
    decode,
    kind_of,
    parquet_library,
    parse_path,
    read_lines,
    sliced,
)
from miles.utils.prompt_store import parquet_batches
from miles_agents.errors import MilesError


@dataclass(frozen=True)
class DataFacts:
    """A file of prompts.

    Attributes:
        error: Why it cannot be read; empty: it can.
        advice: What can be done about that.
        rows: Rows in the slice, or in all of it. Nothing else is told of what lies outside.
        columns: Of its first row.
        absent: Of the columns that were asked for, those that some row of it lacks: the number of the first such line.
        broken: Number of its first line that is not a JSON object or holds something of the wrong kind, and what is
            wrong with it. Of a Parquet file, the row; 0 if that cannot be told.
        unit: ``line`` or ``row``.
        has_messages: The prompt of its first row is a list of messages.
        bytes: The file's size, told if no row is in the slice.
    """

    error: str = ""
    rows: int = 0
    columns: tuple[str, ...] = ()
    absent: dict[str, int] = field(default_factory=dict)
    broken: tuple[int, str] | None = None
    advice: str = ""
    unit: str = "line"
    has_messages: bool = False
    bytes: int = 0


def read_data(path: str, keys: Sequence[str], kinds: Iterable[Columns] = ()) -> DataFacts:
    """Look at a file.

    Args:
        path: With or without a slice.
        keys: Columns whose absence is to be told.
        kinds: What columns have to hold where a row has them.
    """
    try:
        name, rows = parse_path(path)
        file = Path(name)
        kind = kind_of(file)
        look = Look(keys, kinds)
        if kind == "parquet":
            found = _parquet(file, rows, look)
        else:
            with buffered(file) as lines:
                found = _jsonl(lines, rows, look)
        return found if found.rows or rows is None else replace(found, bytes=file.stat().st_size)
    except EmptyDataset:
        return DataFacts()
    except OSError as error:
        return DataFacts(error=f"cannot be read: {error}")
    except MilesError as error:
        return DataFacts(error=f"{error.what}: {error.evidence}", advice=error.advice)


class Look:
    """Looks at rows, one after the other, and notes the first of each thing."""

    def __init__(self, keys: Sequence[str], kinds: Iterable[Columns]) -> None:
        self.keys = tuple(dict.fromkeys(keys))
        self.kinds = tuple(kinds)
        self.columns: tuple[str, ...] = ()
        self.has_messages = False
        self.absent: dict[str, int] = {}
        self._known: tuple[str, ...] = ()

    def at(self, number: int, row: Mapping[str, Any]) -> str:
        """Look at a row. What is wrong with it; empty: nothing."""
        if not self.columns:
            self.columns = tuple(row)
            self.has_messages = self._is_list(row)
        for key in self.keys:
            if key not in row:
                self.absent.setdefault(key, number)
        return self.wrong(row)

    def _is_list(self, row: Mapping[str, Any]) -> bool:
        return any(isinstance(row.get(columns.prompt), list) for columns in self.kinds)

    def wrong(self, row: Mapping[str, Any]) -> str:
        """What a row holds of the wrong kind; empty: nothing."""
        for columns in self.kinds:
            fault = columns.fault(row)
            if fault is not None and (why := self._why(columns, row, fault)):
                return why
        return ""

    def _why(self, columns: Columns, row: Mapping[str, Any], fault: Fault) -> str:
        """A column that is absent is told by its absence; the others of that row have to be right nevertheless."""
        if not fault.wanted:
            filled = {**dict.fromkeys(name for name in (columns.prompt, columns.label) if name), **row}
            filled[columns.prompt] = row.get(columns.prompt, "")
            found = columns.fault(filled)
            if found is None:
                return ""
            fault = found
        return f"column {fault.column!r} ({fault.flag}) is not {fault.wanted}; it is {fault.there}"

    def facts(self, rows: int, broken: tuple[int, str] | None = None, unit: str = "line") -> DataFacts:
        """What was seen."""
        return DataFacts(
            rows=rows,
            columns=self.columns,
            absent=self.absent,
            broken=broken,
            unit=unit,
            has_messages=self.has_messages,
        )


def _jsonl(file: BufferedReader, rows: slice | None, look: Look) -> DataFacts:
    count = 0
    at = look.at
    for line in sliced(read_lines(file), rows, file):
        try:
            why = at(line.number, decode(line.text))
        except ValueError as error:
            why = str(error)
        if why:
            return look.facts(count, (line.number, why))
        count += 1
    return look.facts(count)


def _parquet(file: Path, rows: slice | None, look: Look) -> DataFacts:
    library = parquet_library(file)
    import pyarrow as pa

    count = 0
    first = 0
    try:
        with library.ParquetFile(file) as opened:
            look.columns = tuple(opened.schema_arrow.names)
            look.has_messages = any(
                pa.types.is_nested(opened.schema_arrow.field(columns.prompt).type)
                for columns in look.kinds
                if columns.prompt in look.columns
            )
            total = opened.metadata.num_rows
        start, stop, _ = (rows or slice(None)).indices(total)
        count = max(0, stop - start)
        look.absent = {key: 1 for key in look.keys if key not in look.columns}
        used = [name for columns in look.kinds for name in columns.names]
        for first, batch in parquet_batches(library, file, rows, used) if count else ():
            if found := _broken_in(batch, look):
                return look.facts(first + found[0] - start, (first + found[0] + 1, found[1]), "row")
    except (pa.ArrowException, OSError) as error:
        return look.facts(first, (0, f"the file is cut off or damaged: {str(error).strip()[:300]}"), "row")
    return look.facts(count, unit="row")


def _broken_in(batch: Any, look: Look) -> tuple[int, str] | None:
    """The first row of a batch that holds something of the wrong kind.

    Columns of text need no look at their rows unless some are null.
    """
    import pyarrow as pa

    def is_simple(name: str) -> bool:
        kind = batch.schema.field(name).type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return (is_text and not batch.column(name).null_count) or name in labels

    checked = {columns.label for columns in look.kinds if columns.label_check is not None or columns.is_learnt}
    labels = {columns.label for columns in look.kinds} - {columns.prompt for columns in look.kinds} - checked
    prompts = {columns.prompt for columns in look.kinds}
    structs = [n for n in batch.schema.names if pa.types.is_struct(batch.schema.field(n).type)]
    objects = [name for name in structs if name not in prompts and not _may_name_reward(batch.schema.field(name).type)]
    looks_at_all = any(columns.rewards_by_metadata or columns.is_learnt for columns in look.kinds)
    if not looks_at_all and all(
        name in objects or (is_simple(name) and name in prompts | labels) for name in batch.schema.names
    ):
        return None
    for place, values in enumerate(batch.to_pylist()):
        if why := look.wrong({name: without_nulls(value) for name, value in values.items()}):
            return place, why
    return None


def _may_name_reward(kind: Any) -> bool:
    return "rm_type" in (kind.field(place).name for place in range(kind.num_fields))
