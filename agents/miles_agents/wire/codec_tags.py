"""The marks by which values that msgpack does not know travel inside a msgpack body.

Such a value is a msgpack array whose first element is an empty extension, the *tag*: a tuple ``(1, 2)`` is
``[<tag 1>, 1, 2]``. Nothing is packed inside extensions, so a body is one flat msgpack document: it is read in
one pass, its depth is msgpack's, and its size bounds what reading it may allocate. A user's value can never
look like a tag. Extension 0 refers to an out-of-band buffer by its index; each buffer is referred to once.

A *packer* turns one value into its list, one level deep; a *builder* turns the list (children already built)
back into the value.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias

from msgpack import ExtType

from miles_agents.wire.codec_types import MAX_BODY_BYTES, LibraryMissing, TooLarge
from miles_agents.wire.transport import ZERO_COPY_BYTES, Buffer

Libraries: TypeAlias = Literal["import", "opaque"]
Packer: TypeAlias = Callable[[Any, "Outgoing"], list[Any]]
Builder: TypeAlias = Callable[[list[Any], "Incoming"], Any]

BUFFER_EXT = 0
TAGS: dict[int, Tag] = {}


class Stuck(Exception):
    """A packer's refusal. The walk that comes after it adds the path, innermost step first."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.steps: list[str] = []


class BadContent(Exception):
    """A builder's refusal of what came over the wire."""


class Tag:
    """One kind of value on the wire. ``ext`` is what a packer puts first into its list."""

    __slots__ = ("build", "ext")

    def __init__(self, number: int, build: Builder) -> None:
        self.ext = ExtType(number, b"")
        self.build = build


def tag(number: int, build: Builder) -> Tag:
    """Give a tag number (1..127, part of the protocol) its meaning. Called at import time."""
    if number in TAGS:
        raise ValueError(f"tag {number} is taken")
    TAGS[number] = Tag(number, build)
    return TAGS[number]


class Outgoing:
    """The buffers of one body being made, and their total size."""

    __slots__ = ("buffers", "total")
    limit = MAX_BODY_BYTES
    inline_below = ZERO_COPY_BYTES

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self.total = 0

    def add(self, data: Buffer) -> bytes | ExtType:
        """Take the bytes of a buffer along: inline if small, else out-of-band, without a copy.

        Raises:
            TooLarge: All buffers together exceed ``limit``.
        """
        view = memoryview(data).cast("B") if type(data) is memoryview else memoryview(data)
        if view.nbytes < self.inline_below:
            return bytes(view)
        return self._take(view)

    def _take(self, buffer: Any) -> ExtType:
        self.total += buffer.nbytes
        if self.total > self.limit:
            raise too_large(self.total)
        self.buffers.append(buffer)
        return ExtType(BUFFER_EXT, (len(self.buffers) - 1).to_bytes(4, "big"))


class Gathered:
    """Elements that do not lie in order: ``write`` puts ``nbytes`` of them, in order, into a buffer of that size."""

    __slots__ = ("nbytes", "write")

    def __init__(self, nbytes: int, write: Callable[[memoryview], None]) -> None:
        self.nbytes = nbytes
        self.write = write


class BulkOutgoing(Outgoing):
    """For the shared-memory store: no limit of its own, and nothing is copied that can be copied once, later."""

    __slots__ = ()
    limit = 2**62
    inline_below = 4096

    def gathers(self, nbytes: int) -> bool:
        """Whether so many bytes that do not lie in order shall be given as ``Gathered``, and not copied into order."""
        return nbytes >= self.inline_below

    def add_gathered(self, gathered: Gathered) -> ExtType:
        """Take elements along that are not in order yet."""
        return self._take(gathered)


def too_large(size: int) -> TooLarge:
    """The error for a message of ``size`` bytes or more."""
    return TooLarge(
        f"one message would carry {size:,} bytes or more",
        evidence=f"the limit for body and buffers together is {MAX_BODY_BYTES:,} bytes",
        advice="Put bulk data into the shared-memory store and send the reference, or send it in parts.",
        size=size,
        limit=MAX_BODY_BYTES,
    )


class OutOfBand:
    """A reference to a buffer, seen while reading; a builder takes the buffer out of it."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Incoming:
    """One body being read. ``open`` counts tags and references that no builder has consumed yet."""

    __slots__ = ("buffers", "libraries", "open", "unused")

    def __init__(self, buffers: Sequence[Buffer], libraries: Libraries) -> None:
        self.buffers = buffers
        self.unused = set(range(len(buffers)))
        self.libraries = libraries
        self.open = 0

    def on_ext(self, number: int, data: bytes) -> Any:
        """msgpack's ``ext_hook``."""
        self.open += 1
        if number == BUFFER_EXT:
            return OutOfBand(int.from_bytes(data, "big"))
        found = TAGS.get(number)
        if found is None or data:
            raise BadContent(f"unknown extension {number} with {len(data)} bytes")
        return found

    def on_list(self, items: list[Any]) -> Any:
        """msgpack's ``list_hook``."""
        if items and type(items[0]) is Tag:
            self.open -= 1
            return items[0].build(items, self)
        return items

    def take(self, reference: Any) -> memoryview:
        """The bytes of a buffer that is part of a value; inline ones are read-only.

        Raises:
            BadContent: No such buffer, or it was taken before.
        """
        if type(reference) is bytes:
            return memoryview(reference)
        if type(reference) is not OutOfBand or reference.index not in self.unused:
            raise BadContent("a reference to a buffer that is not there or belongs to another value")
        self.open -= 1
        self.unused.discard(reference.index)
        return memoryview(self.buffers[reference.index]).cast("B")

    def finish(self) -> None:
        """Check that every tag, reference and buffer found its place.

        Raises:
            BadContent: One did not.
        """
        if self.open or self.unused:
            raise BadContent(f"{self.open} misplaced tags or references, {len(self.unused)} buffers without one")

    def library(self, name: Literal["numpy", "torch"]) -> ModuleType | None:
        """The library, or None where it shall not be loaded for this.

        Raises:
            LibraryMissing: It should be imported and cannot be.
        """
        if self.libraries == "opaque" and name not in sys.modules:
            return None
        try:
            return importlib.import_module(name)
        except ImportError as exc:
            raise LibraryMissing(
                f"a value of {name} arrived, and {name} cannot be imported here",
                evidence=str(exc),
                advice=f"Install {name} in this environment ({sys.executable}), or do not send its values here.",
                library=name,
            ) from exc


def expect(ok: bool, text: str) -> None:
    """Refuse content of the wire unless ``ok``."""
    if not ok:
        raise BadContent(text)


def read_shape(plain: Any) -> tuple[int, ...]:
    """Check that ``plain`` is a shape: at most 64 non-negative integers."""
    good = type(plain) is list and len(plain) <= 64 and all(type(n) is int and n >= 0 for n in plain)
    expect(good, "a shape that is none")
    return tuple(plain)
