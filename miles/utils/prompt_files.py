"""Files of prompts: which kind one is, its rows one at a time, and what is wrong with the first that cannot be read.

Read twice in a run: by the process that checks flags, and by the rollout manager. Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import orjson

from miles_agents.errors import ConfigError

PARQUET_MAGIC = b"PAR1"
_SLICE = re.compile(r"^(?P<path>.*)@\[(?P<start>[^\[\]:]*):(?P<end>[^\[\]]*)\]$", re.DOTALL)
_BOM = b"\xef\xbb\xbf"
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unzstd"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_OTHER_TEXT = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class NoDataset(ConfigError):
    """A data file is not there, or of a kind that cannot be read."""

    code = "E-DATA-001"


class BrokenRow(ConfigError):
    """A row of a data file cannot be read, or holds something of the wrong kind."""

    code = "E-DATA-002"


class MissingColumn(ConfigError):
    """A row lacks a column that a flag names."""

    code = "E-DATA-003"


class EmptyDataset(ConfigError):
    """A data file has no rows, or the slice of it has none."""

    code = "E-DATA-004"


@dataclass(frozen=True)
class Line:
    """A line of a JSONL file that is not blank.

    Attributes:
        number: From 1, blank lines counted.
        offset: Of its first byte.
        text: Its bytes.
    """

    number: int
    offset: int
    text: bytes


def parse_path(path: str) -> tuple[str, slice | None]:
    """``path@[a:b]`` in its two parts. Both ends may be left open, or count from the end of the file.

    Raises:
        NoDataset: What stands in the brackets is not two whole numbers.
    """
    match = _SLICE.match(path)
    if match is None:
        return path, None
    try:
        start, end = (int(match[name]) if match[name].strip() else None for name in ("start", "end"))
    except ValueError as error:
        raise NoDataset(
            f"{path} does not end in rows of a file",
            evidence=f"{error}",
            advice="Write PATH@[a:b] with whole numbers. Either may be left out, or count from the end: @[:-8].",
        ) from error
    return match["path"], slice(start, end)


def kind_of(file: Path) -> str:
    """``jsonl`` or ``parquet``: by its first bytes, because names lie.

    Raises:
        NoDataset: It is not there, or something else, which is told. EmptyDataset: it has no byte.
    """
    if not file.is_file():
        raise _not_a_file(file)
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise NoDataset(
            f"{file} cannot be read", evidence=str(error), advice="Give the user of this run access to it."
        ) from error
    if not head:
        raise EmptyDataset(f"{file} is empty", evidence="it has 0 bytes", advice="Write the file, or correct the path.")
    for magic, (name, command) in _PACKED.items():
        if head.startswith(magic):
            raise NoDataset(
                f"{file} is compressed",
                evidence=f"its first bytes are those of {name}",
                advice=f"Unpack it: {command} {file}",
            )
    for magic, name in _OTHER_TEXT.items():
        if head.startswith(magic):
            raise NoDataset(
                f"{file} is text in {name}",
                evidence="its first bytes say so",
                advice=f"Write it as UTF-8: iconv -f {name} -t UTF-8",
            )
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    if file.suffix == ".parquet":
        raise NoDataset(
            f"{file} is no Parquet file",
            evidence=f"it begins with {head[:16]!r}, not with {PARQUET_MAGIC!r}",
            advice="Write the file again; a JSONL file must not be named .parquet.",
        )
    if head.removeprefix(_BOM).lstrip().startswith(b"["):
        raise NoDataset(
            f"{file} holds a list, not a row in each line",
            evidence=f"it begins with {head[:32].decode(errors='replace')!r}",
            advice=f"Write one JSON object per line: jq -c '.[]' {file} > rows.jsonl",
        )
    return "jsonl"


def _not_a_file(file: Path) -> NoDataset:
    if file.is_dir():
        what, evidence = f"{file} is a directory, not a file", _listing(file)
    elif file.exists():
        what, evidence = f"{file} is no ordinary file", "pipes and devices cannot be read twice"
    else:
        what, evidence = f"there is no data file {file}", _listing(file.parent)
    return NoDataset(
        what,
        evidence=evidence,
        advice="Give --prompt-data (or --eval-prompt-data) the path of a .jsonl or .parquet file.",
    )


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return f"there is no directory {directory}"
    return f"{directory} has: {', '.join(sorted(entry.name for entry in directory.iterdir())[:20]) or 'nothing'}"


def buffered(file: Path) -> BufferedReader:
    """A file, opened for reading from its beginning to its end."""
    return BufferedReader(FileIO(str(file)), 1 << 20)


def read_lines(opened: BufferedReader) -> Iterator[Line]:
    """The lines of a JSONL file that are not blank. A byte order mark before the first is left out."""
    offset = 0
    if opened.peek(len(_BOM))[: len(_BOM)] == _BOM:
        offset = len(opened.read(len(_BOM)))
    for number, text in enumerate(opened, 1):
        if not text.isspace():
            yield Line(number, offset, text)
        offset += len(text)


def sliced(lines: Iterator[Line], rows: slice | None, opened: BufferedReader) -> Iterator[Line]:
    """The lines that a slice selects. What lies before and behind is not looked into.

    A slice that counts from the end needs all to be counted first: the file is read twice.
    """
    start, stop = 0, None
    if rows is not None:
        start, stop = rows.start or 0, rows.stop
        if start < 0 or (stop or 0) < 0:
            start, stop, _ = rows.indices(sum(1 for _ in lines))
            opened.seek(0)
            lines = read_lines(opened)
    for index, line in enumerate(lines):
        if stop is not None and index >= stop:
            return
        if index >= start:
            yield line


def decode(text: bytes) -> dict[str, Any]:
    """The object of a line.

    What the JSON standard leaves out and Python's module writes (``NaN``, ``Infinity``, numbers of any size) is read.

    Raises:
        ValueError: It is none; says why.
    """
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        values = _decode_slowly(text)
    if type(values) is not dict:
        raise ValueError(f"it is {_kind(values)}, not an object: {shown(text)}")
    return values


def _decode_slowly(text: bytes) -> Any:
    try:
        words = text.decode().rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1} of it, 0x{text[error.start]:02x}, is no UTF-8: {shown(text)}"
        ) from None
    try:
        values = json.loads(words)
    except RecursionError:
        raise ValueError(f"it is nested too deeply: {shown(text)}") from None
    except ValueError as error:
        raise ValueError(f"{error}: {shown(text)}") from None
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"it has half of a character (a lone \\ud8xx of UTF-16): {shown(text)}") from None
    return values


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def shown(text: bytes, limit: int = 160) -> str:
    """The beginning of a line, for people."""
    cut = text[:limit].decode(errors="replace").strip()
    return f"{cut}..." if len(text) > limit else cut


def broken(where: str, why: str) -> BrokenRow:
    """The error for a line that cannot be read."""
    return BrokenRow(f"{where} cannot be read", evidence=why, advice="Each line must be one JSON object, in UTF-8.")


def parquet_library(file: Path) -> Any:
    """pyarrow's Parquet module.

    Raises:
        NoDataset: It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise NoDataset(
            f"{file} is a Parquet file, which needs pyarrow",
            evidence=str(error),
            advice="Install it (pip install pyarrow), or convert the file to JSONL.",
        ) from error
    return pyarrow.parquet
