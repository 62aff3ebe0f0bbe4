"""The types that are registered to travel: dataclasses, enums, named tuples, and anything else by converter.

The wire carries a registered *name*; the receiver looks the class up in its own registry and never imports a
module because a message names it.
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, overload

from miles_agents.wire.codec_types import BadRegistration, UnknownType

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """How one class travels. ``names`` are its fields, ``mark`` a checksum of them that both sides compare."""

    cls: type
    name: str
    kind: str
    names: tuple[str, ...] = ()
    mark: int = 0
    to_plain: Callable[[Any], Any] | None = None
    from_plain: Callable[[Any], Any] | None = None


_BY_NAME: dict[str, Registration] = {}
_BY_CLASS: dict[type, Registration] = {}


@overload
def register_type(cls: C, *, name: str | None = None) -> C: ...
@overload
def register_type(cls: None = None, *, name: str | None = None) -> Callable[[C], C]: ...
def register_type(cls: C | None = None, *, name: str | None = None) -> C | Callable[[C], C]:
    """Let values of a dataclass, an Enum or a NamedTuple travel. A decorator, with or without ``name``.

    A dataclass arrives with the field values it was sent with; neither ``__init__`` nor ``__post_init__`` runs,
    so frozen classes, ``init=False`` fields and derived fields arrive as they were. Attributes that are not
    fields stay behind. Both sides must import the module that registers the class.

    Args:
        cls: The class.
        name: Its name on the wire; default ``module:qualname``.

    Raises:
        BadRegistration: Another class has the name, or the class is none of the three kinds.
    """
    if cls is None:
        return lambda c: register_type(c, name=name)
    kind, names = _kind_of(cls)
    mark = zlib.crc32("\0".join(names).encode("utf-8", "surrogatepass"))
    _add(Registration(cls, name or default_name(cls), kind, names, mark))
    return cls


def register_converter(cls: type[T], name: str, to_plain: Callable[[T], Any], from_plain: Callable[[Any], T]) -> None:
    """Let values of exactly ``cls`` travel as ``to_plain(value)``, and arrive as ``from_plain`` of that.

    Args:
        cls: The class; subclasses need converters of their own.
        name: Its name on the wire, unique in the run.
        to_plain: Gives a value that can travel (it may contain registered types).
        from_plain: The inverse. It sees data from the wire: it should check it, and raise ValueError.

    Raises:
        BadRegistration: Another class has the name.
    """
    _add(Registration(cls, name, "converter", to_plain=to_plain, from_plain=from_plain))


def register_as(cls: type[T], base: type[T]) -> None:
    """Let values of ``cls`` travel like those of ``base``, a registered class, and arrive as such."""
    _BY_CLASS[cls] = _BY_CLASS[base]


def registration_of(cls: type) -> Registration | None:
    """The registration of exactly this class."""
    return _BY_CLASS.get(cls)


def registration_named(name: Any, kind: str) -> Registration:
    """The registration that the wire names.

    Raises:
        UnknownType: There is none of that kind.
    """
    found = _BY_NAME.get(name) if type(name) is str else None
    if found is None or found.kind != kind:
        raise unknown_type(name, kind)
    return found


def is_registered(name: Any) -> bool:
    """Whether any class is registered under this name."""
    return type(name) is str and name in _BY_NAME


def unknown_type(name: Any, kind: str) -> UnknownType:
    """The error for a name that means nothing here."""
    shown = str(name)[:200]
    return UnknownType(
        f"a value of the {kind} '{shown}' arrived, which is not registered in this process",
        evidence=f"registered here: {', '.join(sorted(_BY_NAME)[:40]) or 'nothing'}",
        advice="Decorate the class with @register_type in a module that sender and receiver both import.",
        name=shown,
    )


def default_name(cls: type) -> str:
    """``module:qualname``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_loaded_class(module: str, qualname: str) -> type | None:
    """A class of a module that is loaded already. Imports nothing and runs no ``__getattr__``."""
    scope: Any = getattr(sys.modules.get(module), "__dict__", {})
    found: type | None = None
    for part in qualname.split("."):
        inner = scope.get(part)
        if not isinstance(inner, type):
            return None
        found, scope = inner, vars(inner)
    return found


def is_namedtuple(cls: type) -> bool:
    """Whether the class was made by ``NamedTuple`` or ``namedtuple``."""
    return issubclass(cls, tuple) and type(vars(cls).get("_fields")) is tuple


def _kind_of(cls: type) -> tuple[str, tuple[str, ...]]:
    if not isinstance(cls, type):
        raise _bad(repr(cls), "it is not a class")
    if issubclass(cls, Enum):
        return "enum", ()
    if is_namedtuple(cls):
        return "named tuple", vars(cls)["_fields"]
    if "__dataclass_fields__" not in vars(cls):
        raise _bad(default_name(cls), "it is neither a dataclass nor an Enum nor a NamedTuple")
    try:
        object.__new__(cls)  # proves that values can be made without running the class's code
    except TypeError as exc:
        raise _bad(default_name(cls), f"its values cannot be made empty: {exc}") from exc
    return "dataclass", tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]


def _add(new: Registration) -> None:
    old = _BY_NAME.get(new.name)
    if old is not None and old.cls is not new.cls:
        raise _bad(default_name(new.cls), f"the name '{new.name}' belongs to {old.cls!r}", "Give it another name=.")
    known = _BY_CLASS.get(new.cls)
    if known is not None and known.name != new.name:
        raise _bad(default_name(new.cls), f"it is registered already, as '{known.name}'", "Register it once.")
    _BY_NAME[new.name] = new
    _BY_CLASS[new.cls] = new


def _bad(who: str, why: str, advice: str = "Use register_converter for it.") -> BadRegistration:
    return BadRegistration(f"cannot register {who}", evidence=why, advice=advice)
