"""How an object lies in its segment. Pure: sizes and offsets in, sizes and offsets out.

One part (one object) begins at a page. It is a head (magic, length of the body, lengths of the buffers), the body that
``wire.codec`` made, then each buffer at a multiple of 64 bytes, so that tensors of any dtype can be views of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from miles_agents.store.errors import DamagedObject

PAGE = 4096
_MAGIC = b"milesob1"
_HEAD = struct.Struct("<8sQQ")
_ALIGN = 64


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


def plan(body_bytes: int, buffer_bytes: Sequence[int]) -> Layout:
    """The layout of a part with a body and buffers of these sizes."""
    head = _HEAD.pack(_MAGIC, body_bytes, len(buffer_bytes)) + struct.pack(f"<{len(buffer_bytes)}Q", *buffer_bytes)
    body = len(head)
    end = body + body_bytes
    offsets = []
    for size in buffer_bytes:
        start = align(end, _ALIGN)
        offsets.append(start)
        end = start + size
    return Layout(head, body, tuple(offsets), end)


def read(part: memoryview) -> tuple[memoryview, list[memoryview]]:
    """Body and buffers of a part, as views of it.

    Raises:
        DamagedObject: It is not what ``plan`` lays out.
    """
    try:
        magic, body_bytes, count = _HEAD.unpack_from(part)
        if magic != _MAGIC or count > len(part) // 8:
            raise struct.error("no head of an object")
        sizes = struct.unpack_from(f"<{count}Q", part, _HEAD.size)
        found = plan(body_bytes, sizes)
    except struct.error as error:
        raise _damaged(str(error), len(part)) from None
    if found.nbytes > len(part):
        raise _damaged(f"it says that it has {found.nbytes} bytes", len(part))
    buffers = [part[start : start + size] for start, size in zip(found.buffers, sizes, strict=True)]
    return part[found.body : found.body + body_bytes], buffers


def _damaged(why: str, size: int) -> DamagedObject:
    return DamagedObject(
        "an object in the store cannot be read",
        evidence=f"{why}; the part has {size} bytes",
        advice="Start all processes of a run from the same version of the code; if they are, report this.",
    )
