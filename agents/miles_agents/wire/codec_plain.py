"""Packers for Python's own types and for registered ones: from values to the lists of the wire."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections import OrderedDict
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from miles_agents.wire.codec_builders import (
    BYTEARRAY,
    BYTES,
    COMPLEX,
    CONVERTED,
    DATACLASS,
    DATE,
    DATETIME,
    DECIMAL,
    ENUM,
    EXCEPTION,
    FROZENSET,
    INT,
    MEMORYVIEW,
    NAMED_TUPLE,
    ORDERED_DICT,
    PATH,
    RANGE,
    SET,
    SLICE,
    TIME,
    TIMEDELTA,
    TUPLE,
    ZONE,
)
from miles_agents.wire.codec_registry import default_name, registration_of
from miles_agents.wire.codec_tags import Outgoing, Packer, Stuck
from miles_agents.wire.transport import ZERO_COPY_BYTES

BYTES_LIKE = frozenset({bytes, bytearray, memoryview})


def _plain_zone(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is dt.timezone:
        args: tuple[Any, ...] = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [args[0] // dt.timedelta(microseconds=1), args[1] if len(args) > 1 else None]
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        return zone.key
    raise Stuck(f"has a time zone of type '{type(zone).__name__}'", "Use datetime.timezone or zoneinfo.ZoneInfo.")


class NeedsWalk(Exception):
    """A packer's word that packing would have to be repeated after a walk."""


def holds_bytes_like(value: Any) -> bool:
    """Whether a bytes-like is the value, or lies right in it.

    msgpack packs those without asking. Looking in the usual places first spares the large ones from being copied
    into a body that is thrown away after the walk.
    """
    cls = type(value)
    if cls is list or cls is dict:
        return not BYTES_LIKE.isdisjoint(map(type, value.values() if cls is dict else value))
    return cls in BYTES_LIKE


def lift(value: Any, out: Outgoing) -> Any:
    """Bytes, bytearray or memoryview in a form that keeps its type; small ``bytes`` need none."""
    if type(value) is memoryview:
        return _pack_memoryview(value, out)
    if type(value) is bytearray:
        return [BYTEARRAY.ext, out.add(value)]
    return value if len(value) < ZERO_COPY_BYTES else [BYTES.ext, out.add(value)]


def _pack_memoryview(value: memoryview, out: Outgoing) -> list[Any]:
    form = value.format.removeprefix("@")
    if len(form) != 1 or value.ndim == 0 or (value.ndim > 1 and not value.nbytes):
        raise Stuck(f"is a memoryview of format '{value.format}'", "Send bytes(view), or an array.")
    data = out.add(value) if value.c_contiguous else out.add(value.tobytes())
    return [MEMORYVIEW.ext, form, list(value.shape or ()), data]


def _pack_tuple(value: tuple[Any, ...], out: Outgoing) -> list[Any]:
    # Arguments of calls and their dict of keywords pass through here: see holds_bytes_like.
    kinds = set(map(type, value))
    if dict in kinds and any(type(x) is dict and holds_bytes_like(x) for x in value):
        raise NeedsWalk
    if BYTES_LIKE.isdisjoint(kinds):
        return [TUPLE.ext, *value]
    return [TUPLE.ext, *(lift(x, out) if type(x) in BYTES_LIKE else x for x in value)]


def _pack_datetime(value: dt.datetime, _: Outgoing) -> list[Any]:
    numbers = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return [DATETIME.ext, numbers, value.fold, _plain_zone(value.tzinfo)]


def _pack_time(value: dt.time, _: Outgoing) -> list[Any]:
    numbers = [value.hour, value.minute, value.second, value.microsecond]
    return [TIME.ext, numbers, value.fold, _plain_zone(value.tzinfo)]


def _pack_enum(value: Enum, _: Outgoing) -> list[Any]:
    cls = type(value)
    known = registration_of(cls)
    if known is None and "<locals>" in cls.__qualname__:
        raise Stuck(f"is a '{cls.__qualname__}', an enum that the receiver cannot find", _REGISTER)
    name = value.name if value.name in cls.__members__ else value.value
    return [ENUM.ext, known.name if known else default_name(cls), name]


def _pack_exception(value: BaseException, _: Outgoing) -> list[Any]:
    from miles_agents.wire.remote_error import describe_exception

    return [EXCEPTION.ext, describe_exception(value, None, [])]


def _pack_registered(value: Any, _: Outgoing) -> list[Any]:
    known = registration_of(type(value))
    if known is None:
        raise Stuck(f"is a '{type(value).__qualname__}'", _REGISTER)
    if known.kind == "named tuple":
        return [NAMED_TUPLE.ext, known.name, known.mark, *value]
    if known.to_plain is not None:
        return [CONVERTED.ext, known.name, known.to_plain(value)]
    try:
        return [DATACLASS.ext, known.name, known.mark, *[getattr(value, n) for n in known.names]]
    except AttributeError as exc:
        raise Stuck(f"is a '{known.cls.__qualname__}' with an unset field ({exc})", "Set the field.") from exc


_REGISTER = "Decorate the class with @register_type in a module that sender and receiver both import."

PACKERS: dict[type, Packer] = {
    tuple: _pack_tuple,
    set: lambda v, _: [SET.ext, *v],
    frozenset: lambda v, _: [FROZENSET.ext, *v],
    int: lambda v, _: [INT.ext, v.to_bytes(v.bit_length() // 8 + 1, "little", signed=True)],
    complex: lambda v, _: [COMPLEX.ext, v.real, v.imag],
    Decimal: lambda v, _: [DECIMAL.ext, str(v)],
    type(Path()): lambda v, _: [PATH.ext, "", str(v)],
    PurePosixPath: lambda v, _: [PATH.ext, "posix", str(v)],
    PureWindowsPath: lambda v, _: [PATH.ext, "windows", str(v)],
    slice: lambda v, _: [SLICE.ext, v.start, v.stop, v.step],
    range: lambda v, _: [RANGE.ext, v.start, v.stop, v.step],
    OrderedDict: lambda v, _: [ORDERED_DICT.ext, *(x for pair in v.items() for x in pair)],
    dt.datetime: _pack_datetime,
    dt.date: lambda v, _: [DATE.ext, v.year, v.month, v.day],
    dt.time: _pack_time,
    dt.timedelta: lambda v, _: [TIMEDELTA.ext, v.days, v.seconds, v.microseconds],
    dt.timezone: lambda v, _: [ZONE.ext, _plain_zone(v)],
    zoneinfo.ZoneInfo: lambda v, _: [ZONE.ext, _plain_zone(v)],
}
"""Packers by exact type."""

CONTAINERS = frozenset({tuple, set, frozenset, slice, OrderedDict})
"""Those of the types above whose lists hold other values."""


def find_plain_packer(cls: type) -> Packer | None:
    """The packer for a registered class, an enum or an exception; else None."""
    if registration_of(cls) is not None and not issubclass(cls, Enum):
        return _pack_registered
    if issubclass(cls, Enum):
        return _pack_enum
    if issubclass(cls, BaseException):
        return _pack_exception
    return None
