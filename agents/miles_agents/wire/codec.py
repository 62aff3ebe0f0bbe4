"""Values to bytes and back: a msgpack body with registered types, and large buffers beside it. Never pickle.

``encode`` is one ``packb`` with a hook for what msgpack does not know. msgpack packs bytes-likes without asking
the hook, though, so it would turn a ``bytearray`` into ``bytes`` and copy large ones; and it cannot say *where*
in a value something sits that cannot travel. Both are found by a walk in Python over the value, which runs only
if the packed body may contain a bytes-like, or if packing failed.

What arrives equals what was sent, type included; what cannot arrive so is refused at the sender. The buffers that
``encode`` returns are views of the caller's memory: it must not change until they are sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import msgpack

from miles_agents.errors import MilesError
from miles_agents.wire.codec_plain import NeedsWalk, holds_bytes_like
from miles_agents.wire.codec_registry import register_converter, register_type
from miles_agents.wire.codec_tags import (
    BadContent,
    BulkOutgoing,
    Gathered,
    Incoming,
    Libraries,
    Outgoing,
    Stuck,
    too_large,
)
from miles_agents.wire.codec_types import (
    MAX_BODY_BYTES,
    BadRegistration,
    CannotTravel,
    LibraryMissing,
    MalformedBody,
    OpaqueArray,
    OpaqueTensor,
    OpaqueValue,
    TooLarge,
    UnknownType,
)
from miles_agents.wire.codec_walk import PACKERS_IN_USE, Walk, cannot_travel, find_packer, may_hold_bytes_like, run_walk
from miles_agents.wire.transport import ZERO_COPY_BYTES, Buffer

__all__ = [
    "MAX_BODY_BYTES",
    "BadRegistration",
    "CannotTravel",
    "Gathered",
    "LibraryMissing",
    "MalformedBody",
    "OpaqueArray",
    "OpaqueTensor",
    "OpaqueValue",
    "TooLarge",
    "UnknownType",
    "decode",
    "decode_bulk",
    "encode",
    "encode_bulk",
    "encode_call",
    "own_buffers",
    "register_converter",
    "register_type",
]

_SMALL_BODY = 1024
_SCALARS = frozenset({type(None), bool, int, float, str})


class _NeedsState(Exception):
    """A value that is more than plain."""


def _needs_state(_number: int, _data: bytes) -> Any:
    raise _NeedsState


def encode(value: Any, *, what: str = "value") -> tuple[bytes, list[memoryview]]:
    """Encode a value.

    Args:
        value: Plain values, containers of them, arrays, CPU tensors, exceptions, registered types.
        what: What to call the value in an error ("arguments", "return value").

    Returns:
        The body, and the buffers of ``ZERO_COPY_BYTES`` and more that travel beside it, in order.

    Raises:
        CannotTravel: Something in the value cannot; the error names the path to it.
        TooLarge: Body and buffers exceed ``MAX_BODY_BYTES``.
    """
    if type(value) in _SCALARS:
        with contextlib.suppress(ValueError, OverflowError):  # what is wrong with it is told below
            body: bytes = msgpack.packb(value)
            if len(body) < ZERO_COPY_BYTES:
                return body, []
    return _encode(value, what, Outgoing)


def encode_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, list[memoryview]]:
    """``encode`` for the arguments of a call, which arrive as ``[list, dict]``; quicker where all are scalars."""
    if not kwargs and _SCALARS.issuperset(map(type, args)):
        with contextlib.suppress(ValueError, OverflowError):  # what is wrong with them is told below
            body: bytes = msgpack.packb((args, kwargs))
            if len(body) < ZERO_COPY_BYTES:
                return body, []
    return _encode([list(args), kwargs], "arguments", Outgoing)


def encode_bulk(value: Any, *, what: str = "value") -> tuple[bytes, list[memoryview | Gathered]]:
    """``encode`` for the store: buffers from 4 KiB up, of any size together; elements out of order are not copied."""
    body, buffers = _encode(value, what, BulkOutgoing)
    return body, cast("list[memoryview | Gathered]", buffers)


def _encode(value: Any, what: str, kind: type[Outgoing]) -> tuple[bytes, list[memoryview]]:
    if holds_bytes_like(value):
        return _encode_walking(value, what, kind, try_leaves=False)
    out = kind()
    try:
        body = _pack(value, out)
    except TooLarge:
        raise
    except NeedsWalk:
        return _encode_walking(value, what, kind, try_leaves=False)
    except Exception:  # noqa: BLE001 - boundary: any value may come, and its class may raise what it likes
        return _encode_walking(value, what, kind, try_leaves=True)
    has_bytes = b"\xc4" in body or b"\xc5" in body or b"\xc6" in body  # msgpack's three markers
    if has_bytes and may_hold_bytes_like(value):
        return _encode_walking(value, what, kind, try_leaves=False)
    return _sized(body, out)


def own_buffers(buffers: Sequence[memoryview]) -> list[memoryview]:
    """The same buffers; those that somebody could still change are copied."""
    return [view if type(view.obj) is bytes else memoryview(bytes(view)) for view in buffers]


def decode(body: Buffer, buffers: Sequence[Buffer], *, libraries: Libraries) -> Any:
    """Decode a body and its buffers. Large arrays and tensors are views of the buffers.

    Args:
        body: What ``encode`` returned first.
        buffers: What it returned second, as they arrived.
        libraries: ``"import"``: load numpy or torch when a value of theirs arrives. ``"opaque"``: stand-ins
            arrive (``OpaqueArray``...) unless the library is loaded already.

    Raises:
        MalformedBody: The input is not what ``encode`` makes.
        UnknownType: It names a type that is not registered here.
        LibraryMissing: A library should be imported and is not installed.
    """
    if not buffers and len(body) <= _SMALL_BODY:
        try:  # most values are plain, and need no state
            return msgpack.unpackb(body, ext_hook=_needs_state, strict_map_key=False, unicode_errors="surrogatepass")
        except Exception:  # noqa: BLE001, S110 - boundary: bytes from another process; what is wrong is told below
            pass
    return _decode(body, buffers, libraries, MAX_BODY_BYTES)


def decode_bulk(body: Buffer, buffers: Sequence[Buffer]) -> Any:
    """``decode`` for the store, of any size. Raises as ``decode``."""
    return _decode(body, buffers, "import", BulkOutgoing.limit)


def _decode(body: Buffer, buffers: Sequence[Buffer], libraries: Libraries, limit: int) -> Any:
    try:
        _check_extent(body, buffers, limit)
        state = Incoming(buffers, libraries)
        value = msgpack.unpackb(
            body,
            ext_hook=state.on_ext,
            list_hook=state.on_list,
            strict_map_key=False,
            unicode_errors="surrogatepass",
        )
        state.finish()
    except MilesError:
        raise
    except Exception as exc:  # boundary: bytes from another process; builders fail in many ways on bad ones
        raise MalformedBody(
            "a message body cannot be read",
            evidence=f"{type(exc).__name__}: {str(exc)[:500]}; {len(body)} bytes, {len(buffers)} buffers",
            advice="Start all processes of a run from the same version of the code; if they are, report this.",
        ) from exc
    return value


def _check_extent(body: Buffer, buffers: Sequence[Buffer], limit: int) -> None:
    total = len(body) + sum(memoryview(b).nbytes for b in buffers)
    if total > limit:
        raise BadContent(f"{total} bytes, more than any sender may send")
    if len(body) > _SMALL_BODY:
        # Lists are allocated at their declared length before their elements are seen. Skipping over the whole
        # body first proves that all declared elements are there, so nested lies allocate nothing.
        unpacker = msgpack.Unpacker(max_buffer_size=len(body))
        unpacker.feed(body)
        unpacker.skip()


def _pack(value: Any, out: Outgoing, unicode_errors: str | None = None) -> bytes:
    def hook(item: Any) -> list[Any]:
        return (PACKERS_IN_USE.get(type(item)) or find_packer(type(item)))(item, out)

    packer = msgpack.Packer(default=hook, strict_types=True, buf_size=4096, unicode_errors=unicode_errors)
    packed: bytes = packer.pack(value)
    return packed


def _sized(body: bytes, out: Outgoing) -> tuple[bytes, list[memoryview]]:
    if len(body) + out.total > out.limit:
        raise too_large(len(body) + out.total)
    return body, out.buffers


def _encode_walking(value: Any, what: str, kind: type[Outgoing], *, try_leaves: bool) -> tuple[bytes, list[memoryview]]:
    walk = Walk(kind(), try_leaves=try_leaves)
    plain = run_walk(walk, value, what)
    try:
        return _sized(_pack(plain, walk.out, "surrogatepass"), walk.out)
    except Stuck as stuck:
        raise cannot_travel(what, stuck) from stuck.__cause__
    except (ValueError, TypeError, OverflowError) as exc:
        raise cannot_travel(what, Stuck(f"cannot be packed ({exc})", "Nest the value less deeply.")) from exc
