"""Log lines that agents forward, made fit for a console: theirs, one line each, bounded, unable to steer it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles_agents.agent.log_dedup import rank_ranges

MAX_LINES = 4096
MAX_CHARS = 16 * 1024
MAX_SOURCE_CHARS = 256
MAX_RANKS = 65536
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def fit_lines(node: str, batch: object) -> Iterator[str | None]:
    """The lines of a batch ``[[source, time, text, ranks that repeated it], ...]`` of a node, as they are shown.

    None stands for an entry that is not the node's to say, or none at all.
    """
    entries = batch if isinstance(batch, list) else [batch]
    for entry in entries[:MAX_LINES]:
        yield _fit(node, entry)
    for _ in entries[MAX_LINES:]:
        yield None


def text_bytes(batch: object) -> int:
    """About how much a batch is to hold and to show; whatever it is, it counts as something."""
    entries = batch if isinstance(batch, list) else []
    texts = [entry[2] for entry in entries if isinstance(entry, list) and len(entry) == 4]
    return 64 * (1 + len(entries)) + sum(len(text) for text in texts if isinstance(text, str))


def _fit(node: str, entry: object) -> str | None:
    if not isinstance(entry, list) or len(entry) != 4:
        return None
    source, _, text, ranks = entry
    if not isinstance(source, str) or not isinstance(text, str) or not _is_ranks(ranks):
        return None
    if len(source) > MAX_SOURCE_CHARS or not source.endswith(f"@{node}") or _CONTROL.search(source):
        return None
    repeated = f" (x{len(ranks)}: ranks {rank_ranges(tuple(ranks))})" if ranks else ""
    return f"{source} | {clean(text)}{repeated}"


def _is_ranks(ranks: object) -> bool:
    return isinstance(ranks, list) and len(ranks) <= MAX_RANKS and all(type(rank) is int for rank in ranks)


def clean(text: str) -> str:
    """One line without terminal sequences and control characters; tabs stay. Cut with a mark if it is too long."""
    left = len(text) - MAX_CHARS
    shown = _CONTROL.sub("", _ESCAPE.sub("", text[:MAX_CHARS]))
    return f"{shown} [{left} more characters]" if left > 0 else shown
