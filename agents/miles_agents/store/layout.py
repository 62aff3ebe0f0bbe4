"""How an object lies in its segment. Pure: sizes and addresses in, offsets out.

One part (one object) begins at a page. It is a head (magic, length of the body, number of buffers, offset and length of
each), the body that ``wire.codec`` made, then the buffers, each at a multiple of 64 bytes, so that tensors of any dtype
can be views of it.

A large buffer lies at the same place within its page as in the producer's memory, rounded down to 64 bytes. Where the
place is a little further, copying takes up to five times as long on processors that compare only the low 12 bits of
addresses to find out whether a load depends on an earlier store.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from miles_agents.store.errors import DamagedObject

PAGE = 4096
_MAGIC = b"milesob1"
_HEAD = struct.Struct("<8sQQ")
_PAIR = struct.Struct("<QQ")
_ALIGN = 64
_LARGE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the pieces of one part lie. Offsets count from the part's beginning."""

    head: bytes
    body: int
    buffers: tuple[int, ...]
    nbytes: int


def align(offset: int, to: int) -> int:
    """The next multiple of ``to``."""
    return -(-offset // to) * to


def plan(body_bytes: int, buffers: Sequence[tuple[int, int]]) -> Layout:
    """The layout of a part with a body of that size, and buffers of these sizes and addresses."""
    body = _HEAD.size + len(buffers) * _PAIR.size
    end = body + body_bytes
    offsets = []
    for size, address in buffers:
        start = align(end, _ALIGN)
        if size >= _LARGE:
            start += (address // _ALIGN * _ALIGN - start) % PAGE
        offsets.append(start)
        end = start + size
    pairs = b"".join(_PAIR.pack(offset, size) for offset, (size, _) in zip(offsets, buffers, strict=True))
    return Layout(_HEAD.pack(_MAGIC, body_bytes, len(buffers)) + pairs, body, tuple(offsets), end)


def read(part: memoryview) -> tuple[memoryview, list[memoryview]]:
    """Body and buffers of a part, as views of it.

    Raises:
        DamagedObject: It is not what ``plan`` lays out.
    """
    if len(part) < _HEAD.size:
        raise _damaged("there is no head", len(part))
    magic, body_bytes, count = _HEAD.unpack_from(part)
    body = _HEAD.size + count * _PAIR.size
    if magic != _MAGIC or body + body_bytes > len(part):
        raise _damaged("its head is not that of an object", len(part))
    buffers, end = [], body + body_bytes
    for offset, size in _PAIR.iter_unpack(part[_HEAD.size : body]):
        if offset < end or offset + size > len(part):
            raise _damaged(f"a buffer of {size} bytes at {offset}", len(part))
        buffers.append(part[offset : offset + size])
        end = offset + size
    return part[body : body + body_bytes], buffers


def _damaged(why: str, size: int) -> DamagedObject:
    return DamagedObject(
        "an object in the store cannot be read",
        evidence=f"{why}; the part has {size} bytes",
        advice="Start all processes of a run from the same version of the code; if they are, report this.",
    )
