"""The shared-memory store: large values by reference between workers, on one node without copies, across nodes once.

from miles_agents import store

ref = store.put(batch)      # in one worker
batch = store.get(ref)      # in another, of any node
store.remove(ref)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_agents.store.api import (
        get,
        get_async,
        put,
        put_async,
        put_parts,
        put_parts_async,
        remove,
        remove_async,
        remove_left_async,
    )
    from miles_agents.store.errors import ObjectLost, ObjectRemoved, StoreFull
    from miles_agents.store.ref import Ref

# Resolved on first use: agents and controllers need only parts of it.
_EXPORTS = {
    **dict.fromkeys(["get", "put", "put_parts", "remove"], "api"),
    **dict.fromkeys(["get_async", "put_async", "put_parts_async", "remove_async", "remove_left_async"], "api"),
    **dict.fromkeys(["ObjectLost", "ObjectRemoved", "StoreFull"], "errors"),
    "Ref": "ref",
}
__all__ = [
    "ObjectLost", "ObjectRemoved", "Ref", "StoreFull",
    "get", "get_async", "put", "put_async", "put_parts", "put_parts_async", "remove", "remove_async",
    "remove_left_async",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
