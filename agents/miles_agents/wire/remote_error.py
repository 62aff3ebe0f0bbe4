"""Errors that happened elsewhere: described as plain data where they are raised, rebuilt where they are awaited.

Consumes an exception and its origin on one side, the description on the other; produces an exception that is both
a ``RemoteError`` and, where that class is loaded here, of the original type, so ``except ValueError`` works as it
would locally. Invariants: rebuilding imports nothing and runs no code of the original class; an error that crosses
several hops keeps its first origin and traceback.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

from miles_agents.errors import MilesError, UserCodeError
from miles_agents.wire.codec import decode
from miles_agents.wire.codec_registry import find_loaded_class
from miles_agents.wire.remote_error_text import describe_plainly, packed, shorten

E = TypeVar("E", bound=MilesError)
_OWN_NAMES = frozenset(
    {"what", "evidence", "advice", "fields", "code", "origin", "log_tail"}
    | {"remote_type", "remote_traceback", "remote_message", "description"}
)
_MEMBERS: dict[type[BaseException], tuple[str, ...]] = {
    OSError: ("errno", "strerror", "filename", "filename2"),
    UnicodeDecodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeEncodeError: ("encoding", "object", "start", "end", "reason"),
    SyntaxError: ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"),
    StopIteration: ("value",),
    ImportError: ("msg", "name", "path"),
    NameError: ("name",),
    AttributeError: ("name",),
}
"""What builtin exceptions keep outside ``args`` and ``__dict__``."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an error was raised. ``actor`` is like ``"trainer[2]"``; ``elapsed_s`` counts from the call's start."""

    actor: str
    host: str
    pid: int
    method: str
    elapsed_s: float
    incarnation: int


class RemoteError(UserCodeError):
    """User code raised in another process. Also an instance of the original type if that is loaded here.

    Attributes:
        remote_type: ``module.qualname`` of the original type.
        remote_message: ``str()`` of the original error.
        remote_traceback: The traceback as it was rendered where the error was raised, chained errors included.
        origin: Where that was; None for an error that travelled as a value.
        log_tail: The last log lines of that process.
        description: The whole description, as it came.

    ``args`` and the attributes of the original are kept where they could travel (texts stand in for arguments
    that could not); attributes named like those above, or like those of ``MilesError``, are not.
    """

    code = "E-USER-001"

    remote_type: str
    remote_message: str
    remote_traceback: str
    origin: Origin | None
    log_tail: list[str]
    description: dict[str, Any]

    def __init_subclass__(cls) -> None:
        """Keep the ``__init_subclass__`` of original types from running."""


def describe_exception(exc: BaseException, origin: Origin | None, log_tail: list[str]) -> dict[str, Any]:
    """Describe an error as plain data: strings, numbers, lists, bytes.

    Args:
        exc: The error; one that was rebuilt here keeps its first description.
        origin: Where it was raised.
        log_tail: The last lines of this process's log; the last 50 are taken.
    """
    if isinstance(exc, RemoteError) and "description" in vars(exc):
        return exc.description
    data = describe_plainly(exc, _members_of(type(exc)))
    data["log_tail"] = [shorten(str(line), 2000) for line in log_tail[-50:]]
    if isinstance(exc, MilesError):
        first = vars(exc).get("origin")
        origin = first if isinstance(first, Origin) else origin
        data["traceback"] = vars(exc).get("remote_traceback") or data["traceback"]
        data["miles"] = _describe_ours(exc)
    data["origin"] = None if origin is None else {**asdict(origin), "elapsed_s": float(origin.elapsed_s)}
    return data


def rebuild_exception(data: Mapping[str, Any]) -> MilesError:
    """Rebuild an error from its description.

    Returns:
        For an error of the runtime: an instance of its own class (the nearest of the five kinds if that is not
        loaded here) with ``origin`` and ``remote_traceback``. Otherwise a ``RemoteError``, which is also of the
        original type if that is loaded, is an ``Exception`` and can be made without its ``__init__``.
    """
    ours = data.get("miles")
    return _rebuild_ours(data, ours) if isinstance(ours, dict) else _rebuild_users(data)


def _describe_ours(exc: MilesError) -> dict[str, Any]:
    lineage = [[c.__module__, c.__qualname__] for c in type(exc).__mro__ if issubclass(c, MilesError)]
    kept = {str(k): p for k, v in exc.fields.items() if (p := packed(v)) is not None}
    texts = {k: shorten(str(getattr(exc, k, "")), 65536) for k in ("code", "what", "evidence", "advice")}
    return {**texts, "fields": kept, "lineage": lineage}


def _rebuild_ours(data: Mapping[str, Any], ours: Mapping[str, Any]) -> MilesError:
    cls = MilesError
    for pair in _list(ours, "lineage"):
        found = find_loaded_class(*pair) if _is_pair_of_text(pair) else None
        if found is not None and issubclass(found, MilesError) and not issubclass(found, RemoteError):
            cls = found
            break
    error = _make(cls, _native_base(cls))
    error.what, error.evidence, error.advice = (_text(ours, k) for k in ("what", "evidence", "advice"))
    error.args = (error.what,)
    error.fields = _unpack_all(ours.get("fields"))
    if (code := _text(ours, "code")) and code != cls.code:
        vars(error)["code"] = code
    vars(error).update(origin=_origin(data), remote_traceback=_text(data, "traceback"))
    return error


def _rebuild_users(data: Mapping[str, Any]) -> RemoteError:
    original = _original_type(_text(data, "module"), _text(data, "qualname"))
    error = _new_remote_error(original)
    error.args = tuple(_unpack_argument(a) for a in _list(data, "args"))
    attributes = _unpack_all(data.get("attributes"))
    vars(error).update({k: v for k, v in attributes.items() if k not in _OWN_NAMES and k != "__notes__"})
    for name, value in _unpack_all(data.get("members")).items():
        _set_member(error, name, value)
    notes = [n for n in _list(data, "notes") if isinstance(n, str)]
    if notes:
        vars(error)["__notes__"] = notes
    _fill(error, data)
    return error


def _fill(error: RemoteError, data: Mapping[str, Any]) -> None:
    error.description = dict(data)
    error.origin = origin = _origin(data)
    error.log_tail = [line for line in _list(data, "log_tail") if isinstance(line, str)]
    error.remote_traceback = _text(data, "traceback")
    error.remote_message = _text(data, "message")
    module, name = _text(data, "module"), _text(data, "qualname")
    error.remote_type = f"{module}.{name}"
    shown = name if module == "builtins" else error.remote_type
    where = f" in {origin.actor}.{origin.method} on {origin.host}, pid {origin.pid}" if origin else ""
    first_line = next(iter(error.remote_message.splitlines()), "")
    error.what = f"{shown}{where}: {shorten(first_line, 500)}"
    log = ["last log lines:", *error.log_tail] if error.log_tail else []
    error.evidence = "\n".join([error.remote_traceback.rstrip("\n"), *log])
    error.advice = "Fix the code shown at the bottom of the traceback."
    error.fields = {"remote_type": error.remote_type}
    if origin is not None:
        error.fields.update(asdict(origin))


def _new_remote_error(original: type[Exception] | None) -> RemoteError:
    if original is not None and (dual := _dual_type(cast("Any", original))) is not None:
        return _make(dual, _native_base(original))
    return _make(RemoteError, MilesError)


def _make(cls: type[E], native: type[BaseException]) -> E:
    made = native.__new__(cls)
    if not isinstance(made, cls):
        raise TypeError(f"{native} made a {type(made)}")
    return made


@lru_cache(maxsize=256)
def _dual_type(original: Any) -> type[RemoteError] | None:
    """A class that is both a RemoteError and ``original``, or None where only the original could make values."""
    if type(original) is not type or issubclass(original, RemoteError):
        return None
    user_made = [c for c in original.__mro__ if c.__module__ != "builtins"]
    for cls in user_made:
        if vars(cls).get("__slots__") or any(name in vars(cls) for name in _OWN_NAMES - {"code"}):
            return None
        if any(name in vars(cls) for name in ("__setattr__", "__getattribute__")):
            return None
    names = {"__module__": RemoteError.__module__, "__qualname__": f"RemoteError({original.__qualname__})"}
    try:
        dual: type[RemoteError] = type(f"RemoteError({original.__name__})", (RemoteError, original), names)
        _make(dual, _native_base(original))
    except TypeError:  # base classes with conflicting layouts, or values that need arguments
        return None
    return dual


def _original_type(module: str, qualname: str) -> type[Exception] | None:
    if module == "builtins":
        found: Any = vars(builtins).get(qualname)
    else:
        found = find_loaded_class(module, qualname)
    good = isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, MilesError)
    return found if good else None


def _native_base(cls: type[Any]) -> type[BaseException]:
    return next(c for c in cls.__mro__ if c.__module__ == "builtins" and issubclass(c, BaseException))


def _members_of(cls: type[BaseException]) -> tuple[str, ...]:
    return next((names for base, names in _MEMBERS.items() if issubclass(cls, base)), ())


def _set_member(error: RemoteError, name: str, value: Any) -> None:
    if name not in _members_of(type(error)):
        return
    try:
        vars(_member_owner(type(error), name))[name].__set__(error, value)
    except (TypeError, AttributeError, ValueError, OverflowError):
        return  # a value of another type than the builtin's slot takes; the text of the error still has it


def _member_owner(cls: type[BaseException], name: str) -> type:
    return next(c for c in cls.__mro__ if c.__module__ == "builtins" and name in vars(c))


def _origin(data: Mapping[str, Any]) -> Origin | None:
    plain = data.get("origin")
    kinds = {"actor": str, "host": str, "pid": int, "method": str, "elapsed_s": float, "incarnation": int}
    if not isinstance(plain, dict) or {k: type(v) for k, v in plain.items()} != kinds:
        return None
    return Origin(**plain)


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key, "")
    return value if isinstance(value, str) else ""


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    return value if isinstance(value, list) else []


def _is_pair_of_text(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)


def _unpack_argument(plain: Any) -> Any:
    if isinstance(plain, list) and len(plain) == 2 and isinstance(plain[1], str):
        value = _unpack(plain[0])
        return plain[1] if value is _LOST else value
    return ""


def _unpack_all(plain: Any) -> dict[str, Any]:
    if not isinstance(plain, dict):
        return {}
    pairs = [(k, _unpack(v)) for k, v in plain.items() if isinstance(k, str)]
    return {k: v for k, v in pairs if v is not _LOST}


_LOST = object()


def _unpack(blob: Any) -> Any:
    if not isinstance(blob, bytes):
        return _LOST
    try:
        return decode(blob, [], libraries="opaque")
    except MilesError:
        return _LOST  # e.g. of a type that only the other process has registered
