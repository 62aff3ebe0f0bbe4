"""The rows of a prompt file, found again by number: positions in a JSONL file, or the columns of a Parquet file.

No row is kept as Python objects. A million rows of JSONL take 20 MB here; of Parquet, as much as the columns that are
used take in Arrow's form.
"""

from __future__ import annotations

import os
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from miles.utils.prompt_columns import Columns, without_nulls
from miles.utils.prompt_files import (
    BrokenRow,
    broken,
    buffered,
    decode,
    kind_of,
    parquet_library,
    parse_path,
    read_lines,
    sliced,
)
from miles_agents.errors import EnvironmentFault

PARQUET_BATCH = 4096


class DataChanged(EnvironmentFault):
    """A data file has been written to while a run uses it."""

    code = "E-DATA-011"


class RowStore(Protocol):
    """Rows of a file."""

    def scan(self) -> Iterator[dict[str, Any]]:
        """Read them all, once and in order; each is checked. From then on they are found by their place."""

    def keep(self, places: Sequence[int]) -> None:
        """Only these of them, from now on."""

    def row(self, place: int) -> dict[str, Any]:
        """One of them, made anew."""

    def __len__(self) -> int: ...


def open_rows(path: str, columns: Columns) -> RowStore:
    """The rows of a path, which may end in ``@[a:b]``. Nothing is read yet but the file's beginning.

    Raises:
        NoDataset, EmptyDataset.
    """
    name, rows = parse_path(path)
    file = Path(name)
    kind = kind_of(file)
    return (ParquetRows if kind == "parquet" else JsonlRows)(file, rows, columns)


class JsonlRows:
    """Rows of a JSONL file, which stays open. What is read again has the checksum that it had."""

    def __init__(self, file: Path, rows: slice | None, columns: Columns) -> None:
        self.file = file
        self._slice = rows
        self._columns = columns
        self._offsets = array("Q")
        self._sizes = array("Q")
        self._sums = array("I")
        self._opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._opened)

    def __len__(self) -> int:
        return len(self._offsets)

    def scan(self) -> Iterator[dict[str, Any]]:
        """See ``RowStore``.

        Raises:
            BrokenRow, MissingColumn.
        """
        fault = self._columns.fault
        with buffered(self.file) as opened:
            for line in sliced(read_lines(opened), self._slice, opened):
                try:
                    row = decode(line.text)
                except ValueError as error:
                    raise broken(f"{self.file}, line {line.number}", str(error)) from error
                if fault(row) is not None:
                    self._columns.check(row, f"{self.file}, line {line.number}")
                self._offsets.append(line.offset)
                self._sizes.append(len(line.text))
                self._sums.append(zlib.crc32(line.text))
                yield row

    def keep(self, places: Sequence[int]) -> None:
        """See ``RowStore``."""
        self._offsets, self._sizes, self._sums = (
            array(column.typecode, (column[place] for place in places))
            for column in (self._offsets, self._sizes, self._sums)
        )

    def row(self, place: int) -> dict[str, Any]:
        """See ``RowStore``.

        Raises:
            DataChanged: These bytes are others now.
        """
        text = os.pread(self._opened, self._sizes[place], self._offsets[place])
        if zlib.crc32(text) != self._sums[place]:
            raise DataChanged(
                f"{self.file} has been changed while this run uses it",
                evidence=f"the row at byte {self._offsets[place]} is not what it was when the run began",
                advice="Write changed data to a new file, or replace the file by renaming; then start the run again.",
            )
        return decode(text)


class ParquetRows:
    """Rows of a Parquet file: the columns that are used, in memory in Arrow's form."""

    def __init__(self, file: Path, rows: slice | None, columns: Columns) -> None:
        self.file = file
        self._slice = rows
        self._columns = columns
        self._library = parquet_library(file)
        self._batches: list[Any] = []
        self._starts: list[int] = []
        self._kept: Sequence[int] = range(0)

    def __len__(self) -> int:
        return len(self._kept)

    def scan(self) -> Iterator[dict[str, Any]]:
        """See ``RowStore``. Row groups outside the slice are not read.

        Raises:
            BrokenRow, MissingColumn.
        """
        import pyarrow as pa

        count = 0
        try:
            with self._library.ParquetFile(self.file) as opened:
                self._columns.check_names(opened.schema_arrow.names, f"{self.file}")
            for first, batch in parquet_batches(self._library, self.file, self._slice, self._columns.names):
                self._batches.append(batch)
                self._starts.append(count)
                for place, values in enumerate(batch.to_pylist()):
                    row = self._plain(values)
                    self._columns.check(row, f"{self.file}, row {first + place + 1}")
                    count += 1
                    yield row
        except (pa.ArrowException, OSError) as error:
            raise unreadable_parquet(self.file, error) from error
        self._kept = range(count)

    def keep(self, places: Sequence[int]) -> None:
        """See ``RowStore``."""
        self._kept = array("Q", (self._kept[place] for place in places))

    def row(self, place: int) -> dict[str, Any]:
        """See ``RowStore``."""
        number = self._kept[place]
        which = bisect_right(self._starts, number) - 1
        [values] = self._batches[which].slice(number - self._starts[which], 1).to_pylist()
        return self._plain(values)

    def _plain(self, values: dict[str, Any]) -> dict[str, Any]:
        for name in (self._columns.prompt, self._columns.tool):
            if name and isinstance(values.get(name), list | dict):
                values[name] = without_nulls(values[name])
        return values


def parquet_batches(library: Any, file: Path, rows: slice | None, names: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Record batches with these columns, as far as there are, of the rows that a slice selects.

    Yields:
        The number of the batch's first row in the file, from 0, and the batch.
    """
    with library.ParquetFile(file) as opened:
        total = opened.metadata.num_rows
        start, stop, _ = (rows or slice(None)).indices(total)
        there = [name for name in opened.schema_arrow.names if name in names]
        first = 0
        for group in range(opened.metadata.num_row_groups):
            size = opened.metadata.row_group(group).num_rows
            if first < stop and first + size > start:
                yield from _within(opened, group, first, (start, stop), there)
            first += size


def _within(
    opened: Any, group: int, first: int, bounds: tuple[int, int], names: list[str]
) -> Iterator[tuple[int, Any]]:
    start, stop = bounds
    for batch in opened.iter_batches(PARQUET_BATCH, row_groups=[group], columns=names, use_threads=False):
        begin, end = max(start, first), min(stop, first + batch.num_rows)
        if begin < end:
            yield begin, batch.slice(begin - first, end - begin)
        first += batch.num_rows


def unreadable_parquet(file: Path, error: Exception) -> BrokenRow:
    """The error for a Parquet file that is damaged."""
    return BrokenRow(
        f"{file} is a Parquet file that cannot be read",
        evidence=str(error).strip()[:500],
        advice="Write the file again: it is cut off or damaged. Or convert it to JSONL.",
    )
