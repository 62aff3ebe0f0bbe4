"""Prompt data: a JSONL or Parquet file as samples.

A path may end in ``@[a:b]``: only these rows. Nothing is dropped but prompts that are too long, which are counted.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.utils.processing_utils import apply_chat_template
from miles.utils.types import Sample
from miles_agents.errors import ConfigError

logger = logging.getLogger(__name__)
_SLICE = re.compile(r"^(?P<path>.*)@\[(?P<start>-?\d*):(?P<end>-?\d*)\]$")
_BATCH = 1024


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


class AllPromptsTooLong(ConfigError):
    """No prompt of a data file is within the limit."""

    code = "E-DATA-005"


@dataclass(frozen=True)
class Row:
    """One row and where it is, for errors."""

    values: dict[str, Any]
    where: str


def parse_path(path: str) -> tuple[str, slice | None]:
    """``path@[a:b]`` in its two parts."""
    match = _SLICE.match(path)
    if match is None:
        return path, None
    start, end = (int(match[name]) if match[name] else None for name in ("start", "end"))
    return match["path"], slice(start, end)


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a file, in order; of JSONL, one line at a time.

    Raises:
        NoDataset: The file is not there, or neither JSONL nor Parquet.
        BrokenRow: A line is no JSON object; names the line.
    """
    name, rows = parse_path(path)
    file = Path(name)
    if not file.is_file():
        raise NoDataset(
            f"there is no data file {name}",
            evidence=_neighbours(file),
            advice="Give --prompt-data (or --eval-prompt-data) the path of a .jsonl or .parquet file.",
        )
    source = _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)
    return source if rows is None else _sliced(source, rows)


def _sliced(source: Iterator[Row], rows: slice) -> Iterator[Row]:
    if (rows.start or 0) < 0 or (rows.stop or 0) < 0:
        yield from list(source)[rows]
    else:
        yield from itertools.islice(source, rows.start, rows.stop)


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:
                raise _broken(where, f"{error}: {line[:200].decode(errors='replace').rstrip()}") from error
            if not isinstance(values, dict):
                raise _broken(where, f"it is a {type(values).__name__}, not an object")
            yield Row(values, where)


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise NoDataset(
            f"{file} is a Parquet file, which needs pyarrow",
            evidence=str(error),
            advice="Install pyarrow, or convert the file to JSONL.",
        ) from error
    import pyarrow as pa

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file}, row {number}")
    except pa.ArrowException as error:
        raise BrokenRow(
            f"{file} cannot be read after row {number}",
            evidence=str(error),
            advice="Write the file again, or convert it to JSONL.",
        ) from error


def _broken(where: str, evidence: str) -> BrokenRow:
    return BrokenRow(f"{where} cannot be read", evidence=evidence, advice="Each line must be one JSON object.")


def _neighbours(file: Path) -> str:
    directory = file.parent
    if not directory.is_dir():
        return f"there is no directory {directory}"
    return f"{directory} has: {', '.join(sorted(entry.name for entry in directory.iterdir())[:20]) or 'nothing'}"


@dataclass(frozen=True)
class Columns:
    """Which columns are what, and the flags that say so."""

    prompt: str
    label: str | None = None
    metadata: str = "metadata"
    tool: str | None = None
    multimodal: dict[str, str] | None = None

    def sample(self, row: Row) -> Sample:
        """The row as a sample.

        Raises:
            MissingColumn, BrokenRow.
        """
        prompt = self._get(row, self.prompt, "--input-key")
        if not isinstance(prompt, str) and not _is_messages(prompt):
            raise self._odd(row, self.prompt, "--input-key", prompt, "text or a list of messages")
        label = None if self.label is None else self._get(row, self.label, "--label-key")
        metadata = row.values.get(self.metadata) or {}
        if not isinstance(metadata, dict):
            raise self._odd(row, self.metadata, "--metadata-key", metadata, "an object")
        tools = row.values.get(self.tool) if self.tool else None
        if tools is not None:
            tools = self._tools(row, tools)
            metadata = {**metadata, "tools": tools}
        media = {kind: row.values[c] for kind, c in (self.multimodal or {}).items() if row.values.get(c) is not None}
        # A label of a number is compared as text.
        text = label if label is None or isinstance(label, str | dict | list) else str(label)
        return Sample(prompt=prompt, label=text, metadata=dict(metadata), multimodal_inputs=media or None)  # type: ignore[arg-type]

    def _get(self, row: Row, column: str, flag: str) -> Any:
        if column not in row.values:
            raise MissingColumn(
                f"{row.where} has no column {column!r}, which {flag} names",
                evidence=f"its columns are: {', '.join(map(repr, row.values)) or 'none'}",
                advice=f"Give {flag} one of them.",
                flag=flag,
            )
        return row.values[column]

    def _tools(self, row: Row, tools: Any) -> Any:
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise self._odd(row, str(self.tool), "--tool-key", tools, "a list of tools, or JSON of one") from error
        if not isinstance(tools, list):
            raise self._odd(row, str(self.tool), "--tool-key", tools, "a list of tools")
        return tools

    def _odd(self, row: Row, column: str, flag: str, value: Any, wanted: str) -> BrokenRow:
        return BrokenRow(
            f"{row.where}: column {column!r} is not {wanted}",
            evidence=f"it is a {type(value).__name__}: {str(value)[:200]}",
            advice=f"Correct the data, or give {flag} another column.",
        )


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


class Dataset:
    """The prompts of a file, in memory.

    Args:
        path: Of a JSONL or Parquet file; ``@[a:b]`` selects rows.
        tokenizer: For chat templates and lengths; None if neither is needed.
        processor: Of a model with media.
        max_length: Longer prompts (in tokens) are left out; None: no limit.
        apply_chat_template: Prompts become text by the tokenizer's template.
        seed: Of shuffling.

    Attributes:
        samples: In the order of the last ``shuffle``.
        num_dropped: Prompts that were too long.

    Raises:
        NoDataset, BrokenRow, MissingColumn, EmptyDataset, AllPromptsTooLong.
    """

    def __init__(
        self, path: str, tokenizer: Any, processor: Any, max_length: int | None, *,
        prompt_key: str = "text", multimodal_keys: dict[str, str] | None = None, label_key: str | None = None,
        tool_key: str | None = None, metadata_key: str = "metadata", seed: int = 42,
        apply_chat_template: bool = False, apply_chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.seed = seed
        self._tokenizer = tokenizer
        self._processor = processor
        columns = Columns(prompt_key, label_key, metadata_key, tool_key, multimodal_keys)
        samples = [columns.sample(row) for row in read_rows(path)]
        if not samples:
            raise EmptyDataset(
                f"{path} has no rows",
                evidence=f"the file has {Path(parse_path(path)[0]).stat().st_size} bytes",
                advice="Check the file, and the rows that @[a:b] selects.",
            )
        if apply_chat_template:
            for sample in samples:
                sample.prompt = self._templated(sample, apply_chat_template_kwargs or {})
        self.origin_samples = samples if max_length is None else self._within(samples, max_length)
        self.num_dropped = len(samples) - len(self.origin_samples)
        self.samples = self.origin_samples
        self.epoch_id = -1

    def _templated(self, sample: Sample, kwargs: dict[str, Any]) -> str:
        messages = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        text = apply_chat_template(self._tokenizer, messages, tools=sample.metadata.get("tools"), **kwargs)
        return str(text)

    def _within(self, samples: list[Sample], max_length: int) -> list[Sample]:
        lengths = self._lengths(samples)
        kept = [sample for sample, length in zip(samples, lengths, strict=True) if length <= max_length]
        if not kept:
            raise AllPromptsTooLong(
                f"all {len(samples)} prompts of {self.path} are longer than {max_length} tokens",
                evidence=f"the shortest has {min(lengths)} tokens",
                advice="Raise --rollout-max-prompt-len (or --rollout-max-context-len), or shorten the prompts.",
            )
        if len(kept) < len(samples):
            logger.warning(
                "%s: %d of %d prompts are longer than %d tokens and are left out (the longest has %d)",
                self.path, len(samples) - len(kept), len(samples), max_length, max(lengths),
            )  # fmt: skip
        return kept

    def _lengths(self, samples: list[Sample]) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(samples), _BATCH):
            lengths += self._batch_lengths(samples[start : start + _BATCH])
        return lengths

    def _batch_lengths(self, samples: list[Sample]) -> list[int]:
        texts = [s.prompt if isinstance(s.prompt, str) else self._templated(s, {}) for s in samples]
        if self._processor is None:
            encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [len(ids) for ids in encoded]
        return [
            len(self._processor(text=text, **(sample.multimodal_inputs or {}))["input_ids"][0])
            for text, sample in zip(texts, samples, strict=True)
        ]

    def shuffle(self, new_epoch_id: int) -> None:
        """Put the samples in the order of this epoch, which depends on ``seed`` and the epoch only."""
        if self.epoch_id == new_epoch_id:
            return
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + new_epoch_id).shuffle(order)  # noqa: S311
        self.samples = [self.origin_samples[i] for i in order]
        self.epoch_id = new_epoch_id

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]
