"""The reference to an object in the store: what travels in place of the object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from miles_agents.wire.codec_registry import register_converter

MIN_STORE_BYTES = 1 << 20


class Key(NamedTuple):
    """An object's name in the run: its home agent (rank and incarnation), and a number that agent gives out once."""

    rank: int
    incarnation: int
    number: int


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to one object. A small value: pass it in calls, keep it, compare it; it holds nothing.

    Attributes:
        home: Name of the node where it was put.
        key: The object's name in the run.
        nbytes: Its size in the store.
    """

    home: str
    key: Key
    nbytes: int

    def __str__(self) -> str:
        return f"object {self.key.number} of {self.home} ({show_bytes(self.nbytes)})"

    def to_plain(self) -> list[object]:
        """Plain values."""
        return [self.home, *self.key, self.nbytes]

    @classmethod
    def from_plain(cls, plain: object) -> Ref:
        """Inverse of ``to_plain``. Raises ValueError."""
        if not isinstance(plain, list | tuple) or len(plain) != 5:
            raise ValueError("a reference has five fields")
        home, *numbers = plain
        if not isinstance(home, str) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("a reference with fields of other types")
        rank, incarnation, number, nbytes = numbers
        return cls(home, Key(rank, incarnation, number), nbytes)


def show_bytes(count: int) -> str:
    """For people: ``64.0 MiB``."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


register_converter(Ref, "miles.ref", Ref.to_plain, Ref.from_plain)
