"""What a flag is, as data. The parser, ``--help``, the reference page and the completeness tests are made of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["int", "float", "str", "path", "json", "count", "yesno", "switch", "off", "tri", "append"]
"""``switch`` is off until named, ``off`` is on until named, ``tri`` has a ``--no-`` twin, ``append`` may be repeated,
``yesno`` takes ``true`` or ``false`` as its value, ``count`` a whole number that may end in k, M, G, T, Ki, Mi, Gi
or Ti."""

Source: TypeAlias = Literal["contract", "reference", "megatron", "ours", "sglang", "router"]
"""Who named the flag: ``contract`` is the documented command line, ``reference`` what the reference system takes beyond
it, ``megatron`` Megatron-LM's own parser, ``sglang`` and ``router`` the installed packages' parsers."""

Plain: TypeAlias = Any
"""A JSON value: None, bool, int, float, str, or a list or dict of such."""

TAKES_NO_VALUE = frozenset({"switch", "off", "tri"})


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        names: As typed, the usual spelling first.
        dest: Its key in the config.
        kind: What is typed after it.
        default: Value if it is not typed.
        help: What it does, in a few words.
        group: Heading in ``--help``.
        choices: Values that exist at all; empty: any of the kind.
        nargs: Number of values: None is one, ``"+"`` and ``"*"`` as in argparse.
        source: Who named it.
        only: The values that are what we do (None: any). Another one is refused with ``reason``.
        reason: Why values outside ``only`` are refused.
        older: An older spelling of these words (one word: of this flag, with the same value), which are read instead.
    """

    names: tuple[str, ...]
    dest: str
    kind: Kind
    default: Plain = None
    help: str = ""
    group: str = ""
    choices: tuple[Plain, ...] = ()
    nargs: str | int | None = None
    source: Source = "contract"
    only: tuple[Plain, ...] | None = None
    reason: str = ""
    older: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The usual spelling."""
        return self.names[0]

    @property
    def status(self) -> str:
        """``honoured``, at least for the values in ``only``, or ``refused``, whatever its value."""
        return "refused" if self.only == () else "honoured"

    @property
    def is_fixed(self) -> bool:
        """Only the values in ``only`` are honoured."""
        return bool(self.only)

    def as_dict(self) -> dict[str, Plain]:
        """As ``miles flags --json`` shows it; docs/flags.md says what the keys mean."""
        return {
            "name": self.name,
            "names": list(self.names),
            "dest": self.dest,
            "type": self.kind,
            "default": self.default,
            "choices": list(self.choices),
            "nargs": self.nargs,
            "group": self.group,
            "help": self.help,
            "status": self.status,
            "values": None if self.only is None else list(self.only),
            "reason": self.reason or None,
            "stands_for": [word for word in self.older if word] if self.older else None,
            "source": self.source,
        }

    def takes(self, value: Plain) -> bool:
        """Whether this value is among those that we do; of several, each of them."""
        if self.only and self.nargs is not None and isinstance(value, list):
            return all(one in self.only for one in value)
        return self.only is None or value in self.only


def _make(name: str, kind: Kind, default: Plain, help_text: str, more: dict[str, Any]) -> Flag:
    names = (name, *more.pop("also", ()))
    dest = more.pop("dest", name.removeprefix("--").replace("-", "_"))
    return Flag(names, dest, kind, default, help_text, **more)


def integer(name: str, default: Plain, help_text: str, **more: Any) -> Flag:
    """A flag with whole numbers; ``more`` are fields of Flag, and ``also``: other spellings."""
    return _make(name, "int", default, help_text, more)


def number(name: str, default: Plain, help_text: str, **more: Any) -> Flag:
    """A flag with real numbers."""
    return _make(name, "float", default, help_text, more)


def text(name: str, default: Plain, help_text: str, **more: Any) -> Flag:
    """A flag with words."""
    return _make(name, "str", default, help_text, more)


def path(name: str, help_text: str, **more: Any) -> Flag:
    """A flag that names a file or directory."""
    return _make(name, "path", more.pop("default", None), help_text, more)


def json_value(name: str, default: Plain, help_text: str, **more: Any) -> Flag:
    """A flag whose value is JSON."""
    return _make(name, "json", default, help_text, more)


def switch(name: str, help_text: str, **more: Any) -> Flag:
    """A flag without a value: off until it is named."""
    return _make(name, "switch", more.pop("default", False), help_text, more)


def off(name: str, dest: str, help_text: str, **more: Any) -> Flag:
    """A flag without a value that turns ``dest`` off, which is on until then."""
    return _make(name, "off", more.pop("default", True), help_text, {**more, "dest": dest})


def tri(name: str, help_text: str, **more: Any) -> Flag:
    """A flag with a ``--no-`` twin, undecided (None) until one of them is named."""
    return _make(name, "tri", more.pop("default", None), help_text, more)


def refused(flag: Flag, reason: str, *, only: tuple[Plain, ...] = ()) -> Flag:
    """The same flag, of which only these values are taken; others are refused with this reason.

    "not built yet" alone is completed by what the flag does. A flag without a value that may be named only because it
    says what is done anyway is on (or off) by default, too.
    """
    default = only[0] if only and flag.kind in {"switch", "off"} else flag.default
    reason = f"{reason}: {flag.help}" if reason == "not built yet" else reason
    return replace(flag, only=only, reason=reason, default=default)


def grouped(group: str, source: Source, *flags: Flag) -> tuple[Flag, ...]:
    """These flags under this heading, from this source."""
    return tuple(replace(flag, group=group, source=source) for flag in flags)
