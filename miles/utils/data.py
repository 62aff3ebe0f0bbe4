"""Prompt data: a JSONL or Parquet file as samples.

A path may end in ``@[a:b]``: only these rows. Nothing is dropped but prompts that are too long, which are counted.
Rows stay in the file (``miles.utils.prompt_store``); a sample is made when it is asked for.
"""

from __future__ import annotations

import copy
import logging
import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from miles.utils.processing_utils import apply_chat_template
from miles.utils.prompt_columns import Columns, tools_of
from miles.utils.prompt_files import BrokenRow, EmptyDataset, MissingColumn, NoDataset, parse_path
from miles.utils.prompt_store import DataChanged, open_rows
from miles.utils.types import Sample
from miles_agents.errors import ConfigError

__all__ = [
    "AllPromptsTooLong", "BrokenRow", "DataChanged", "Dataset", "EmptyDataset", "MissingColumn", "NoDataset",
    "parse_path",
]  # fmt: skip

logger = logging.getLogger(__name__)
_BATCH = 1024
_MOST_TOKENS_PER_BYTE = 12
"""More tokens than this for each byte, and this once more, no tokenizer makes: normalising a text (NFKC) can make up to
eleven bytes of one."""


class AllPromptsTooLong(ConfigError):
    """No prompt of a data file is within the limit."""

    code = "E-DATA-005"


class Dataset:
    """The prompts of a file.

    Args:
        path: Of a JSONL or Parquet file; ``@[a:b]`` selects rows.
        tokenizer: For chat templates and lengths; None if neither is needed.
        processor: Of a model with media.
        max_length: Longer prompts (in tokens) are left out; None: no limit.
        apply_chat_template: Prompts become text by the tokenizer's template.
        seed: Of shuffling.

    Attributes:
        origin_samples: In the file's order.
        samples: In the order of the last ``shuffle``.
        num_dropped: Prompts that were too long.

    What is taken out of ``samples`` or ``origin_samples`` is kept, so that changes to it stay; ``copies`` keeps
    nothing. Both can be replaced by a list.

    Raises:
        NoDataset, BrokenRow, MissingColumn, EmptyDataset, AllPromptsTooLong. DataChanged: later, on access.
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
        self._columns = Columns(prompt_key, label_key, metadata_key, tool_key, multimodal_keys)
        self._templates = apply_chat_template
        self._template_kwargs = apply_chat_template_kwargs or {}
        self._store = open_rows(path, self._columns)
        self._kept: dict[int, Sample] = {}
        self.num_dropped = self._read(max_length)
        self.origin_samples: Sequence[Sample] = LazySamples(self, range(len(self._store)))
        self.samples: Sequence[Sample] = self.origin_samples
        self.epoch_id = -1

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self, max_length: int | None) -> int:
        """Read all rows, and leave out those that are too long: how many."""
        lengths = Lengths(max_length, self._tokenizer, self._processor)
        for row in self._store.scan():
            if max_length is not None or self._templates:
                lengths.add(self._text(row), self._media(row))
        lengths.finish()
        total = len(self._store)
        if not total:
            raise EmptyDataset(
                f"{self.path} has no rows",
                evidence=f"the file has {Path(parse_path(self.path)[0]).stat().st_size} bytes",
                advice="Check the file, and the rows that @[a:b] selects.",
            )
        if max_length is None or not lengths.too_long:
            return 0
        if len(lengths.too_long) == total:
            raise AllPromptsTooLong(
                f"all {total} prompts of {self.path} are longer than {max_length} tokens",
                evidence=f"the shortest has {lengths.shortest} tokens",
                advice="Raise --rollout-max-prompt-len (or --rollout-max-context-len), or shorten the prompts.",
            )
        dropped = set(lengths.too_long)
        self._store.keep([place for place in range(total) if place not in dropped])
        logger.warning(
            "%s: %d of %d prompts are longer than %d tokens and are left out (the longest has %d)",
            self.path, len(dropped), total, max_length, lengths.longest,
        )  # fmt: skip
        return len(dropped)

    def _text(self, row: dict[str, Any]) -> str:
        """The prompt of a row as the engine gets it."""
        prompt = row[self._columns.prompt]
        if isinstance(prompt, str):
            if not self._templates:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        tools = self._tools(row)
        return str(apply_chat_template(self._tokenizer, prompt, tools=tools, **self._template_kwargs))

    def _tools(self, row: dict[str, Any]) -> list[Any] | None:
        value = row.get(self._columns.tool) if self._columns.tool else None
        return None if value is None else tools_of(value)

    def _media(self, row: dict[str, Any]) -> dict[str, Any] | None:
        keys = self._columns.multimodal or {}
        return {kind: row[column] for kind, column in keys.items() if row.get(column) is not None} or None

    def _sample(self, row: dict[str, Any], text: str | None = None) -> Sample:
        columns = self._columns
        label = None if columns.label is None else row[columns.label]
        metadata = dict(row.get(columns.metadata) or {}) if columns.metadata else {}
        if (tools := self._tools(row)) is not None:
            metadata["tools"] = tools
        return Sample(
            prompt=(self._text(row) if text is None else text) if self._templates else row[columns.prompt],
            # A label of a number is compared as text.
            label=label if label is None or isinstance(label, str | dict | list) else str(label),  # type: ignore[arg-type]
            metadata=metadata,
            multimodal_inputs=self._media(row),
        )

    # -- samples ---------------------------------------------------------------------------------------------

    def sample_at(self, place: int) -> Sample:
        """The sample of a row: the same object each time."""
        if place not in self._kept:
            self._kept[place] = self._sample(self._store.row(place))
        return self._kept[place]

    def copies(self, index: int, count: int) -> list[Sample]:
        """So many samples of one prompt, which share nothing. ``index`` counts in ``samples``."""
        place = self.samples.place(index) if isinstance(self.samples, LazySamples) else None
        if place is None or place in self._kept:
            return [copy.deepcopy(self.samples[index]) for _ in range(count)]
        text = None
        made = []
        for _ in range(count):
            row = self._store.row(place)
            if self._templates and text is None:
                text = self._text(row)
            made.append(self._sample(row, text))
        return made

    def shuffle(self, new_epoch_id: int) -> None:
        """Put the samples in the order of this epoch, which depends on ``seed`` and the epoch only."""
        if self.epoch_id == new_epoch_id:
            return
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + new_epoch_id).shuffle(order)  # noqa: S311
        origin = self.origin_samples
        lazy = isinstance(origin, LazySamples)
        self.samples = LazySamples(self, array("Q", order)) if lazy else [origin[i] for i in order]
        self.epoch_id = new_epoch_id

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class LazySamples(Sequence[Sample]):
    """Samples of a data set in some order, made when they are asked for."""

    def __init__(self, dataset: Dataset, order: Sequence[int]) -> None:
        self._dataset = dataset
        self._order = order

    def place(self, index: int) -> int:
        """Which row of the data set it is."""
        return self._order[index]

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._dataset.sample_at(place) for place in self._order[index]]
        return self._dataset.sample_at(self._order[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._dataset.sample_at, self._order)


class Lengths:
    """Counts tokens of prompts, many at a time, and remembers which are too long.

    A prompt that cannot be too long for its few bytes is not tokenized.
    """

    def __init__(self, limit: int | None, tokenizer: Any, processor: Any) -> None:
        self.too_long: list[int] = []
        self.longest = 0
        self.shortest = 0
        self._limit = limit
        self._tokenizer = tokenizer
        self._processor = processor
        self._count = 0
        self._waiting: list[tuple[int, str, dict[str, Any] | None]] = []

    def add(self, text: str, media: dict[str, Any] | None) -> None:
        """The next prompt."""
        place = self._count
        self._count += 1
        if self._limit is None:
            return
        if not media and (4 * len(text) + 1) * _MOST_TOKENS_PER_BYTE <= self._limit:
            return
        self._waiting.append((place, text, media))
        if len(self._waiting) == _BATCH:
            self.finish()

    def finish(self) -> None:
        """Count those that wait."""
        if not self._waiting:
            return
        for (place, _, _), length in zip(self._waiting, self._lengths(), strict=True):
            if length > (self._limit or 0):
                self.shortest = min(self.shortest, length) if self.too_long else length
                self.longest = max(self.longest, length)
                self.too_long.append(place)
        self._waiting.clear()

    def _lengths(self) -> list[int]:
        if self._processor is None:
            encoded = self._tokenizer([text for _, text, _ in self._waiting], add_special_tokens=False)["input_ids"]
            return [len(ids) for ids in encoded]
        return [len(self._processor(text=text, **(media or {}))["input_ids"][0]) for _, text, media in self._waiting]
