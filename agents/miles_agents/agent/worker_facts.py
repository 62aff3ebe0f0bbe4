"""What a worker may say of itself in its beats, and what of it the controller has not heard. Pure.

User code runs in workers, so nothing they say is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

MAX_TEXT = 200
MAX_UNANSWERED = 32
_AGE_S = 1.0
_LAG_S = 0.05
_LARGEST = 2**63
_KINDS: Mapping[str, type] = MappingProxyType(
    {"progress": int, "queued": int, "running": int, "call": str, "call_age_s": float, "lag_s": float}
)


def known_facts(said: Any) -> dict[str, Any]:
    """Of what was said, the facts with a known name and a plain value of its kind; the rest is dropped."""
    if not isinstance(said, Mapping):
        return {}
    found = {name: _plain(said.get(name), kind) for name, kind in _KINDS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any, kind: type) -> int | float | str | None:
    if kind is str:
        return value[:MAX_TEXT] if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return None
    return value if abs(value) < _LARGEST else None  # no number at all is not smaller either


class FactNews:
    """Which workers a beat has to tell of: those that changed since the last beat that was answered.

    A thousand nodes tell the same of eight thousand idle workers every second otherwise. Consumes: what is so now,
    numbers of beats that were sent and answered. Produces: the entries ``[mesh, rank, incarnation, pid, state, facts]``
    of the next beat. Invariant: what a beat told is told again until a beat with it was answered; a beat may be lost.
    That a call grows older is no news: who reads of it adds the time since.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], tuple[float, Sequence[Any]]] = {}
        self._sent: dict[int, tuple[float, list[list[Any]]]] = {}

    def news(self, entries: list[list[Any]], now: float) -> list[list[Any]]:
        """Those of ``entries`` (all workers) that are not known over there; what is not among them is forgotten."""
        if len(self._told) > len(entries):
            living = {(entry[0], entry[1]) for entry in entries}
            self._told = {key: told for key, told in self._told.items() if key in living}
        return [entry for entry in entries if self._is_new(entry, now)]

    def sent(self, beat: int, entries: list[list[Any]], now: float) -> None:
        """A beat with these entries left."""
        for entry in entries:  # what the other side knows of these is uncertain until an answer comes
            self._told.pop((entry[0], entry[1]), None)
        self._sent[beat] = now, entries
        if len(self._sent) > MAX_UNANSWERED:
            del self._sent[next(iter(self._sent))]

    def answered(self, beat: int) -> None:
        """It was heard. Earlier ones may have been lost."""
        at, entries = self._sent.get(beat, (0.0, []))
        for entry in entries:
            self._told[entry[0], entry[1]] = at, entry
        self._sent = {other: sent for other, sent in self._sent.items() if other > beat}

    def _is_new(self, entry: list[Any], now: float) -> bool:
        at, told = self._told.get((entry[0], entry[1]), (0.0, ()))
        return not told or entry[:5] != told[:5] or _differ(told[5], entry[5], now - at)


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], elapsed_s: float) -> bool:
    """Whether facts have changed in a way that somebody would want to know."""
    if any(old.get(name) != new.get(name) for name in ("progress", "queued", "running", "call")):
        return True
    age = old.get("call_age_s", 0.0) + elapsed_s if new.get("call") else 0.0
    if abs(new.get("call_age_s", 0.0) - age) > _AGE_S:
        return True
    return bool(abs(new.get("lag_s", 0.0) - old.get("lag_s", 0.0)) > _LAG_S)
