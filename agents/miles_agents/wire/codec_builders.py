"""Builders for Python's own types and for registered ones: from the lists of the wire back to values.

No builder imports a module or runs code that the wire names, beyond the registered converters.
"""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections import OrderedDict
from decimal import Decimal
from enum import Enum, Flag
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from miles_agents.wire.codec_registry import (
    Registration,
    find_loaded_class,
    is_registered,
    registration_named,
    unknown_type,
)
from miles_agents.wire.codec_tags import Incoming, expect, tag
from miles_agents.wire.codec_types import UnknownType


def _build_tuple(items: list[Any], _: Incoming) -> Any:
    return tuple(items[1:])


def _build_set(items: list[Any], _: Incoming) -> Any:
    return set(items[1:])


def _build_frozenset(items: list[Any], _: Incoming) -> Any:
    return frozenset(items[1:])


def _build_int(items: list[Any], _: Incoming) -> Any:
    (_, data) = items
    return int.from_bytes(data, "little", signed=True)


def _build_complex(items: list[Any], _: Incoming) -> Any:
    (_, real, imag) = items
    expect(type(real) is type(imag) is float, "a complex number of other parts than floats")
    return complex(real, imag)


def _build_bytes(items: list[Any], state: Incoming) -> Any:
    (_, reference) = items
    view = state.take(reference)
    whole = view.obj
    return whole if type(whole) is bytes and len(whole) == view.nbytes else bytes(view)


def _build_bytearray(items: list[Any], state: Incoming) -> Any:
    (_, reference) = items
    return bytearray(state.take(reference))


def _build_memoryview(items: list[Any], state: Incoming) -> Any:
    (_, form, shape, reference) = items
    view = state.take(reference)
    shaped = view.cast(form) if len(shape) == 1 else view.cast(form, shape)
    expect(shaped.shape == tuple(shape), "a memoryview of another shape than its buffer")
    return shaped


def _build_decimal(items: list[Any], _: Incoming) -> Any:
    (_, text) = items
    expect(type(text) is str, "a decimal that is not text")
    return Decimal(text)


_PATHS: dict[str, type[PurePath]] = {"": Path, "posix": PurePosixPath, "windows": PureWindowsPath}


def _build_path(items: list[Any], _: Incoming) -> Any:
    (_, kind, text) = items
    expect(type(text) is str, "a path that is not text")
    return _PATHS[kind](text)


def _build_slice(items: list[Any], _: Incoming) -> Any:
    (_, start, stop, step) = items
    return slice(start, stop, step)


def _build_range(items: list[Any], _: Incoming) -> Any:
    (_, start, stop, step) = items
    return range(start, stop, step)


def _build_ordered_dict(items: list[Any], _: Incoming) -> Any:
    return OrderedDict(zip(items[1::2], items[2::2], strict=True))


def _build_datetime(items: list[Any], _: Incoming) -> Any:
    (_, numbers, fold, zone) = items
    year, month, day, hour, minute, second, micro = numbers
    return dt.datetime(year, month, day, hour, minute, second, micro, _read_zone(zone), fold=fold)


def _build_date(items: list[Any], _: Incoming) -> Any:
    return dt.date(*items[1:])


def _build_time(items: list[Any], _: Incoming) -> Any:
    (_, numbers, fold, zone) = items
    hour, minute, second, micro = numbers
    return dt.time(hour, minute, second, micro, _read_zone(zone), fold=fold)


def _build_timedelta(items: list[Any], _: Incoming) -> Any:
    (_, days, seconds, micros) = items
    return dt.timedelta(days, seconds, micros)


def _build_zone(items: list[Any], _: Incoming) -> Any:
    (_, zone) = items
    return _read_zone(zone)


def _build_enum(items: list[Any], _: Incoming) -> Any:
    (_, name, member) = items
    if is_registered(name):
        cls: type | None = registration_named(name, "enum").cls
    else:
        expect(type(name) is str, "an enum without a name")
        module, _, qualname = name.partition(":")
        cls = find_loaded_class(module, qualname)
    if cls is None or not issubclass(cls, Enum):
        raise unknown_type(name, "enum")
    if type(member) is int and issubclass(cls, Flag):
        return cls(member)  # a combination of flags has no name of its own
    expect(type(member) is str and member in cls.__members__, f"no member {member!r:.100} in enum {name}")
    return cls[member]


def _build_dataclass(items: list[Any], _: Incoming) -> Any:
    found = _registration_for(items, "dataclass")
    value: Any = object.__new__(found.cls)
    for name, field in zip(found.names, items[3:], strict=True):
        object.__setattr__(value, name, field)
    return value


def _build_named_tuple(items: list[Any], _: Incoming) -> Any:
    return tuple.__new__(_registration_for(items, "named tuple").cls, items[3:])


def _build_converted(items: list[Any], _: Incoming) -> Any:
    (_, name, plain) = items
    found = registration_named(name, "converter")
    if found.from_plain is None:
        raise unknown_type(name, "converter")
    return found.from_plain(plain)


def _build_exception(items: list[Any], _: Incoming) -> Any:
    from miles_agents.wire.remote_error import rebuild_exception

    (_, data) = items
    expect(type(data) is dict, "an exception that is not described")
    return rebuild_exception(data)


def _registration_for(items: list[Any], kind: str) -> Registration:
    expect(len(items) >= 3, f"a {kind} without a name")
    found = registration_named(items[1], kind)
    if items[2] != found.mark or len(items) - 3 != len(found.names):
        raise UnknownType(
            f"a value of the {kind} '{found.name}' arrived with other fields than the class has here",
            evidence=f"fields here: {', '.join(found.names) or 'none'}; {len(items) - 3} values arrived",
            advice="Start all processes of a run from the same version of the code.",
            name=found.name,
        )
    return found


def _read_zone(plain: Any) -> dt.tzinfo | None:
    if plain is None:
        return None
    if type(plain) is str:
        return zoneinfo.ZoneInfo(plain)
    offset, name = plain
    if offset == 0 and name is None:
        return dt.UTC
    delta = dt.timedelta(microseconds=offset)
    return dt.timezone(delta) if name is None else dt.timezone(delta, name)


TUPLE = tag(1, _build_tuple)
SET = tag(2, _build_set)
FROZENSET = tag(3, _build_frozenset)
INT = tag(4, _build_int)
COMPLEX = tag(5, _build_complex)
BYTES = tag(6, _build_bytes)
BYTEARRAY = tag(7, _build_bytearray)
MEMORYVIEW = tag(8, _build_memoryview)
DECIMAL = tag(9, _build_decimal)
PATH = tag(10, _build_path)
SLICE = tag(11, _build_slice)
RANGE = tag(12, _build_range)
ORDERED_DICT = tag(13, _build_ordered_dict)
DATETIME = tag(14, _build_datetime)
DATE = tag(15, _build_date)
TIME = tag(16, _build_time)
TIMEDELTA = tag(17, _build_timedelta)
ZONE = tag(18, _build_zone)
ENUM = tag(19, _build_enum)
DATACLASS = tag(20, _build_dataclass)
NAMED_TUPLE = tag(21, _build_named_tuple)
CONVERTED = tag(22, _build_converted)
EXCEPTION = tag(23, _build_exception)
