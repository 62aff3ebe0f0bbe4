"""What a worker may say of itself in its beats. Pure. User code runs there, so nothing it says is taken as it is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

MAX_TEXT = 200
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
