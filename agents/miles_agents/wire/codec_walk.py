"""The walk over a value that cannot be packed in one go, and the choice of packers by type."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import msgpack

from miles_agents.errors import MilesError
from miles_agents.wire.codec_arrays import OPAQUE_PACKERS, find_array_packer
from miles_agents.wire.codec_builders import TUPLE
from miles_agents.wire.codec_plain import BYTES_LIKE, CONTAINERS, PACKERS, find_plain_packer, lift
from miles_agents.wire.codec_registry import is_namedtuple, registration_of
from miles_agents.wire.codec_tags import Outgoing, Packer, Stuck
from miles_agents.wire.codec_types import CannotTravel
from miles_agents.wire.transport import ZERO_COPY_BYTES

_BUILTIN_CONTAINERS = frozenset({list, dict, tuple, set, frozenset})
_PLAIN = frozenset({str, int, float, bool, type(None)})
_IN_KEY = object()
PACKERS_IN_USE: dict[type, Packer] = {**PACKERS, **OPAQUE_PACKERS}
"""Packers by exact type; grows as values of further types are met."""


def find_packer(cls: type) -> Packer:
    """The packer for values of exactly this class.

    Raises:
        Stuck: There is none.
    """
    packer = PACKERS_IN_USE.get(cls) or find_plain_packer(cls) or find_array_packer(cls)
    if packer is None:
        raise Stuck(f"is a '{_shown(cls)}'", _advice(cls))
    if not issubclass(cls, BaseException):  # those may be many and short-lived
        PACKERS_IN_USE[cls] = packer
    return packer


def _shown(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _advice(cls: type) -> str:
    if dataclasses.is_dataclass(cls) or is_namedtuple(cls):
        return f"Decorate {cls.__qualname__} with @register_type in a module that sender and receiver both import."
    for base in (dict, list, tuple, set, frozenset, str, bytes, int, float):
        if issubclass(cls, base):
            return f"Convert it to a plain {base.__name__} before sending it."
    return (
        "Send plain values, arrays or CPU tensors in its place; for a class of your own use @register_type or "
        "register_converter; for bulk data use the shared-memory store."
    )


def may_hold_bytes_like(value: Any) -> bool:
    """Whether a value that was packed holds a bytes-like that has to be lifted, or something to walk into for it.

    Level by level at C speed (five times faster than a loop), since every body with a float in it may ask.
    """
    found = [value]
    while found:
        kinds = set(map(type, found)) - _PLAIN
        if bytes in kinds and any(type(x) is bytes and len(x) >= ZERO_COPY_BYTES for x in found):
            return True
        if not all(kind is bytes or kind in _BUILTIN_CONTAINERS or _is_leaf(kind) for kind in kinds):
            return True
        level = [x for x in found if type(x) in _BUILTIN_CONTAINERS] if kinds else []
        found = gc.get_referents(*level)
    return False


def _is_leaf(cls: type) -> bool:
    """Whether values of the class hold no other values, as far as packing goes."""
    if cls in BYTES_LIKE or cls in CONTAINERS:
        return False
    return registration_of(cls) is None or issubclass(cls, Enum)


def run_walk(walk: Walk, value: Any, what: str) -> Any:
    """The walk's copy of a value, or CannotTravel with the path."""
    try:
        return walk.visit(value)
    except Stuck as stuck:
        raise cannot_travel(what, stuck) from stuck.__cause__
    except RecursionError:
        raise cannot_travel(what, Stuck("is nested too deeply", "Nest the value less deeply.")) from None


def cannot_travel(what: str, stuck: Stuck) -> CannotTravel:
    """The error for the user. ``what`` is the root of the path."""
    path = list(reversed(stuck.steps))
    return CannotTravel(
        f"cannot travel: {what}{''.join(path)} {stuck.reason}",
        evidence="the wire carries plain values, arrays, CPU tensors, exceptions and registered types, never pickles",
        advice=stuck.advice,
        path="".join(path),
    )


class Walk:
    """Visits a value: gives a copy in which bytes-likes are lifted, or a Stuck with the path to what stops it.

    Leaves that the pack hook converts are left to it, unless ``try_leaves`` asks to find out which of them fails.
    """

    def __init__(self, out: Outgoing, *, try_leaves: bool) -> None:
        self.out = out
        self._try_leaves = try_leaves
        self._open: set[int] = set()

    def visit(self, value: Any) -> Any:
        """One frame of Python's stack per level of the value."""
        cls = type(value)
        if cls in _PLAIN:
            return value
        if cls in BYTES_LIKE:
            return lift(value, self.out)
        if id(value) in self._open:
            raise Stuck(f"is a {cls.__name__} that contains itself", "Send a value without cycles.")
        parts = self._parts(value, cls)
        if parts is None:
            return value
        self._open.add(id(value))
        index: Any = None
        made: Any = {} if cls is dict else []
        try:
            if cls is dict:
                for key, item in parts.items():
                    index = _IN_KEY
                    self._check_key(key)
                    index = key
                    made[key] = self.visit(item)
            else:
                for index, item in enumerate(parts):  # noqa: B007
                    made.append(self.visit(item))
        except Stuck as stuck:
            stuck.steps.append(_step(value, cls, index))
            raise
        finally:
            self._open.discard(id(value))
        return made

    def _check_key(self, key: Any) -> None:
        """Keys are hashable, so a converted one (a list by now) cannot stand in a dict: the hook converts it."""
        if type(key) in _PLAIN or type(key) is bytes:
            return
        with _named_key(key):
            if type(key) is memoryview:
                raise Stuck("is a memoryview", "Use bytes as the key.")
            Walk(Outgoing(), try_leaves=self._try_leaves).visit(key)

    def _parts(self, value: Any, cls: type) -> Any:
        """The list or dict that stands for a value, or None if the value can stay as it is."""
        if cls is list:
            return None if _PLAIN.issuperset(map(type, value)) else value
        if cls is dict:
            plain = _PLAIN.issuperset(map(type, value.values())) and _PLAIN.issuperset(map(type, value))
            return None if plain else value
        if cls is tuple:
            return [TUPLE.ext, *value]
        if cls is msgpack.ExtType:
            return None  # made by lift and by packers
        if not _is_leaf(cls):
            return _attempt(lambda: find_packer(cls)(value, self.out))
        if self._try_leaves:
            _attempt(lambda: find_packer(cls)(value, Outgoing()))
        return None


def _attempt(pack: Callable[[], list[Any]]) -> list[Any]:
    try:
        return pack()
    except (Stuck, RecursionError, MilesError):
        raise
    except Exception as exc:  # boundary: properties, to_plain and __str__ of users' classes
        raise Stuck(f"fails to be packed ({type(exc).__name__}: {exc})", "Mend the error named first.") from exc


@contextlib.contextmanager
def _named_key(key: Any) -> Iterator[None]:
    try:
        yield
    except Stuck as stuck:
        stuck.steps.append(f" (in the key {key!r:.80})")
        raise


def _step(value: Any, cls: type, index: Any) -> str:
    """How a path goes from a value to its part number ``index`` (for a dict: its key)."""
    if cls is dict:
        return "" if index is _IN_KEY else f"[{index!r:.80}]"
    if cls is list:
        return f"[{index}]"
    if cls is tuple:
        return f"[{index - 1}]"
    if cls is OrderedDict:
        return f"[{list(value)[(index - 1) // 2]!r:.80}]"
    known = registration_of(cls)
    if known is not None and known.names and index >= 3:
        return f".{known.names[index - 3]}"
    if issubclass(cls, (set, frozenset, slice, Enum)):
        return f" (in the {cls.__name__})"
    return ""
