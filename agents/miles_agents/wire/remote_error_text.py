"""The describing half of remote errors: what of an exception can be told in bounded, plain data."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import miles_agents
from miles_agents.wire.codec import encode

MAX_TEXT = 64 * 1024
MAX_ATTRIBUTES = 64 * 1024
MAX_CAUSES = 16
_RUNTIME = str(Path(miles_agents.__file__).parent) + "/"
_depth: ContextVar[int] = ContextVar("depth_of_exceptions_in_exceptions", default=0)


def describe_plainly(exc: BaseException, members: tuple[str, ...]) -> dict[str, Any]:
    """Type, text, traceback, notes, causes, and of arguments and attributes what can travel in 64 KiB.

    Args:
        exc: The exception. Its own ``__str__`` and ``__repr__`` may fail.
        members: Names of attributes that its builtin base keeps outside ``__dict__``.
    """
    cls = type(exc)
    data: dict[str, Any] = {
        "module": cls.__module__,
        "qualname": cls.__qualname__,
        "message": shorten(safe_str(exc), MAX_TEXT),
        "traceback": shorten(render_traceback(exc), MAX_TEXT),
        "notes": _notes(exc),
        "causes": _causes(exc),
        "args": [],
        "attributes": {},
        "members": {},
    }
    if _depth.get() >= 2:
        return data  # exceptions that hold exceptions that hold exceptions (or each other) are told as text
    token = _depth.set(_depth.get() + 1)
    try:
        budget = _Budget(MAX_ATTRIBUTES)
        data["args"] = [[budget.pack(a), shorten(safe_repr(a), 500)] for a in exc.args[:64]]
        own = {k: v for k, v in vars(exc).items() if k != "__notes__"}
        data["members"] = budget.pack_all({k: _member(exc, k) for k in members})
        data["attributes"] = budget.pack_all(own)
    finally:
        _depth.reset(token)
    return data


def packed(value: Any) -> bytes | None:
    """The value encoded, or None if it cannot travel, is large, or holds large buffers."""
    return _Budget(MAX_ATTRIBUTES).pack(value)


class _Budget:
    """Packs values until their total size is used up; what does not fit or travel is left out."""

    def __init__(self, left: int) -> None:
        self._left = left

    def pack(self, value: Any) -> bytes | None:
        try:
            body, buffers = encode(value)
        except Exception:  # noqa: BLE001 - boundary: values of users' exceptions; best effort by contract
            return None
        if buffers or len(body) > self._left:
            return None
        self._left -= len(body)
        return body

    def pack_all(self, values: dict[str, Any]) -> dict[str, bytes]:
        pairs = [(k, self.pack(v)) for k, v in values.items() if isinstance(k, str)]
        return {k: p for k, p in pairs if p is not None}


def render_traceback(exc: BaseException) -> str:
    """The traceback with source lines, notes and chained errors.

    The runtime's own frames above the user's code are left out; an error with no other frames keeps them all.
    """
    try:
        rendered = traceback.TracebackException.from_exception(exc, compact=True)
        for part in _parts(rendered):
            _trim(part.stack)
        return "".join(rendered.format())
    except Exception as failure:  # noqa: BLE001 - boundary: rendering calls code of users' classes
        return f"{type(exc).__qualname__}: (the traceback cannot be rendered: {type(failure).__name__})\n"


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters: the start and, three times as long, the end."""
    if len(text) <= limit:
        return text
    head = limit // 4
    tail = limit - head
    return f"{text[:head]}\n... {len(text) - limit} characters left out ...\n{text[-tail:]}"


def safe_str(value: Any) -> str:
    """``str(value)``, also if that raises."""
    try:
        return str(value)
    except Exception as failure:  # noqa: BLE001 - boundary: __str__ of a user's class
        return f"({type(value).__qualname__}.__str__ raised {type(failure).__name__})"


def safe_repr(value: Any) -> str:
    """``repr(value)``, also if that raises."""
    try:
        return repr(value)
    except Exception as failure:  # noqa: BLE001 - boundary: __repr__ of a user's class
        return f"({type(value).__qualname__}.__repr__ raised {type(failure).__name__})"


def _parts(rendered: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    todo: list[traceback.TracebackException | None] = [rendered]
    while todo:
        part = todo.pop()
        if part is not None:
            yield part
            todo += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or [])]


def _trim(stack: traceback.StackSummary) -> None:
    first = next((i for i, frame in enumerate(stack) if not frame.filename.startswith(_RUNTIME)), 0)
    del stack[:first]


def _notes(exc: BaseException) -> list[str]:
    notes = getattr(exc, "__notes__", None)
    return [shorten(safe_str(n), 4096) for n in notes[:32]] if isinstance(notes, (list, tuple)) else []


def _causes(exc: BaseException) -> list[dict[str, str]]:
    causes: list[dict[str, str]] = []
    seen = {id(exc)}
    below = _cause_of(exc)
    while below is not None and id(below) not in seen and len(causes) < MAX_CAUSES:
        seen.add(id(below))
        name = f"{type(below).__module__}.{type(below).__qualname__}"
        causes.append({"type": name, "message": shorten(safe_str(below), 4096)})
        below = _cause_of(below)
    return causes


def _cause_of(exc: BaseException) -> BaseException | None:
    return exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)


def _member(exc: BaseException, name: str) -> Any:
    with contextlib.suppress(Exception):  # boundary: unset slots and users' properties raise what they like
        return getattr(exc, name)
    return None
