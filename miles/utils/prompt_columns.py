"""Which columns of a prompt file are what, and what is wrong with a row that does not hold that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from miles.utils.prompt_files import BrokenRow, MissingColumn

_ABSENT = object()


class Fault(NamedTuple):
    """What is wrong with a row.

    Attributes:
        column: Which of its columns.
        flag: That named it.
        wanted: What it should be; empty: the row lacks the column.
        there: What it is.
    """

    column: str
    flag: str
    wanted: str
    there: str


@dataclass(frozen=True)
class Columns:
    """Which columns are what, and the flags that say so."""

    prompt: str
    label: str | None = None
    metadata: str | None = "metadata"
    tool: str | None = None
    multimodal: Mapping[str, str] | None = None
    prompt_flag: str = "--input-key"
    label_flag: str = "--label-key"
    tool_flag: str = "--tool-key"
    label_check: Callable[[Any], str] | None = None
    """What a label should be and is not; empty: nothing. Not asked for rows that name a reward of their own."""
    metadata_check: Callable[[Any], str] | None = None
    """Why a row's metadata is of no use to the row's reward; empty: it is."""
    rewards_by_metadata: bool = False
    """All rows are rewarded by what their metadata says, so that each of them has to be looked at."""
    is_learnt: bool = False
    """Rows are answers to learn: a conversation with an assistant's message, or a text with a label."""

    @property
    def names(self) -> list[str]:
        """All of them."""
        found = [self.prompt, self.label, self.metadata, self.tool, *(self.multimodal or {}).values()]
        return list(dict.fromkeys(name for name in found if name))

    def fault(self, row: Mapping[str, Any]) -> Fault | None:
        """What keeps a row from being used; None: nothing."""
        prompt = row.get(self.prompt, _ABSENT)
        if type(prompt) is not str and (fault := self._prompt_fault(prompt)):
            return fault
        if self.is_learnt and (fault := self._learning_fault(row, prompt)):
            return fault
        if self.label is not None and self.label not in row:
            return Fault(self.label, self.label_flag, "", "")
        if self.label_check is not None and (fault := self._label_fault(row, self.label_check)):
            return fault
        return self._more_fault(row)

    def _label_fault(self, row: Mapping[str, Any], check: Callable[[Any], str]) -> Fault | None:
        metadata = row.get(self.metadata) if self.metadata else None
        if self.label is None or (isinstance(metadata, dict) and metadata.get("rm_type")):
            return None
        wanted = check(row[self.label])
        return Fault(self.label, self.label_flag, wanted, _shown(row[self.label])) if wanted else None

    def _prompt_fault(self, prompt: Any) -> Fault | None:
        if prompt is _ABSENT:
            return Fault(self.prompt, self.prompt_flag, "", "")
        found = _message_fault(prompt)
        return Fault(self.prompt, self.prompt_flag, *found) if found else None

    def _learning_fault(self, row: Mapping[str, Any], prompt: Any) -> Fault | None:
        if isinstance(prompt, list):
            if any(m["role"] == "assistant" and m.get("step_loss_mask", 1) for m in prompt):
                return None
            roles = f"a list with the roles {', '.join(m['role'] for m in prompt)}"[:200]
            return Fault(self.prompt, self.prompt_flag, "a conversation with an assistant's message to learn", roles)
        label = row.get(self.label) if self.label else None
        if label is None or label == "" or isinstance(label, dict | list):
            there = _shown(label) if self.label in row else "not there"
            return Fault(self.label or "label", self.label_flag, "an answer to learn, which a text needs", there)
        return None

    def _more_fault(self, row: Mapping[str, Any]) -> Fault | None:
        metadata = row.get(self.metadata) if self.metadata else None
        if metadata is not None and type(metadata) is not dict:
            return Fault(str(self.metadata), "--metadata-key", "an object", _shown(metadata))
        if self.metadata_check is not None and (why := self.metadata_check(metadata)):
            return Fault(str(self.metadata), "--metadata-key", "what the row's reward needs", why)
        tools = row.get(self.tool) if self.tool else None
        if tools is not None and tools_of(tools) is None:
            return Fault(str(self.tool), self.tool_flag, "a list of tools, or JSON of one", _shown(tools))
        return None

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Refuse a row that cannot be used.

        Raises:
            MissingColumn, BrokenRow.
        """
        fault = self.fault(row)
        if fault is not None:
            raise error_of(fault, where, list(row))

    def check_names(self, names: Sequence[str], where: str) -> None:
        """Refuse a file whose rows all lack a column.

        Raises:
            MissingColumn.
        """
        for column, flag in ((self.prompt, self.prompt_flag), (self.label, self.label_flag)):
            if column is not None and column not in names:
                raise error_of(Fault(column, flag, "", ""), where, list(names))


def error_of(fault: Fault, where: str, columns: list[str]) -> MissingColumn | BrokenRow:
    """The error for a row."""
    if not fault.wanted:
        return MissingColumn(
            f"{where} has no column {fault.column!r}, which {fault.flag} names",
            evidence=f"its columns are: {', '.join(map(repr, columns)) or 'none'}",
            advice=f"Give {fault.flag} one of them.",
            flag=fault.flag,
        )
    return BrokenRow(
        f"{where}: column {fault.column!r} is not {fault.wanted}",
        evidence=f"it is {fault.there}",
        advice=f"Correct the data, or give {fault.flag} another column.",
        flag=fault.flag,
    )


def tools_of(value: Any) -> list[Any] | None:
    """A column of tools as a list, which may be written as JSON; None: it is none."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return None
        value = [] if value is None else value
    return value if isinstance(value, list) and all(isinstance(tool, dict) for tool in value) else None


def without_nulls(value: Any) -> Any:
    """Without the entries of objects that are null: a column of Parquet has all keys of all rows in each."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


_NEEDS_CONTENT = frozenset({"system", "user"})
"""An assistant's message may be calls of tools alone."""


def _message_fault(prompt: Any) -> tuple[str, str] | None:
    """What a list of messages should be and is not, and what there is instead; None: nothing."""
    if not isinstance(prompt, list) or not prompt:
        return "text or a list of messages with roles", _shown(prompt)
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or "role" not in message:
            return "text or a list of messages with roles", _shown(prompt)
        role, content = message["role"], message.get("content")
        if type(role) is not str:
            return "a list of messages whose roles are text", f"a message {number} whose role is {_shown(role)}"
        if type(content) is str:
            continue
        if content is None and role in _NEEDS_CONTENT:
            return "a list of messages with contents", f"a message {number} of role {role!r} without content"
        if content is not None and not _are_parts(content):
            wanted = "a list of messages whose contents are text, lists of parts or null"
            return wanted, f"a message {number} whose content is {_shown(content)}"
    return None


def _are_parts(content: Any) -> bool:
    """``[{"type": "text", "text": ...}, {"type": "image", ...}]``."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and ("type" in part or "text" in part) for part in content
    )


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}: {str(value)[:200]}" if value is not None else "null"
