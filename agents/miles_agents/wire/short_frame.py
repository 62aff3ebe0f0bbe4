"""The short form of a DATA frame: one whole envelope, one receiver, no buffers. Nearly every message is such.

It says exactly what the msgpack form says (``wire/session.py``, ``wire/envelope.py``), in fixed places, so that a hop
reads and checks it in one step, and passes the envelope on without making it anew. All numbers are little-endian::

    0   mark 0xC1 (no msgpack begins so), version, 6 bytes of zero
    8   session, seq, ack                                                     64 bit each
    32  kind, flags, bytes of the method                                       8 bit each, 5 bytes of zero
    40  rid, source mesh, rank, incarnation, mesh, rank, incarnation, position,
        size, trace, remaining ms + 1 (0: no deadline)                        64 bit each
    128 method (UTF-8), body

What begins at 32, the envelope's part, also stands as an item (bytes) in a DATA frame, where several travel together.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias

from miles_agents.wire.envelope import (
    FLAT_BYTES,
    KIND_NAMES,
    MAX_METHOD_CHARS,
    MAX_NUMBER,
    MAX_REMAINING_MS,
    Address,
    Envelope,
    malformed,
)
from miles_agents.wire.transport import ZERO_COPY_BYTES, Buffer

MARK = 0xC1
SHORT = bytes([MARK])
"""What a short frame begins with."""
_HEAD = struct.Struct("<BB6xQQQ")
_ENVELOPE = struct.Struct("<BBB5x11Q")
_WHOLE = struct.Struct("<BB6xQQQBBB5x11Q")
_NO_HEAD = (0, 0, 0, 0, 0)
_MAX_BODY_BYTES = ZERO_COPY_BYTES - _WHOLE.size - 4 * MAX_METHOD_CHARS - 1
"""The whole stays below the size from which frames are views and not bytes."""
_tuple = tuple.__new__


def pack_envelope(envelope: Envelope, now: float) -> bytes | None:
    """The envelope's part of a short frame; None if it does not fit into one, for whatever reason."""
    short = envelope.short
    deadline = envelope.deadline
    if short is not None and deadline is None:
        return short
    targets, body = envelope.targets, envelope.body
    if envelope.buffers or len(targets) != 3 or len(body) > _MAX_BODY_BYTES:
        return None
    method = envelope.method.encode()
    if len(method) > MAX_METHOD_CHARS:
        return None
    try:
        left = 0 if deadline is None else 1 + int(max(0.0, min((deadline - now) * 1000, MAX_REMAINING_MS)))
        head = _ENVELOPE.pack(
            envelope.kind, envelope.flags, len(method), envelope.rid, *envelope.source, envelope.mesh, *targets,
            envelope.size, envelope.trace, left,
        )  # fmt: skip
    except (struct.error, ValueError):  # the long form names what is wrong
        return None
    return head + method + body


def pack_each(envelope: Envelope) -> list[Packed] | None:
    """For an envelope with many receivers: one to each. None: it does not fit into short frames."""
    body, source = envelope.body, envelope.source
    method = envelope.method.encode()
    if envelope.buffers or envelope.deadline is not None or len(body) > _MAX_BODY_BYTES:
        return None
    if len(method) > MAX_METHOD_CHARS:
        return None
    tail, flat = method + body, envelope.targets
    front = (envelope.kind, envelope.flags, len(method), envelope.rid, *source, envelope.mesh)
    back = (envelope.size, envelope.trace, 0)
    pack = _ENVELOPE.pack
    return [
        _tuple(Packed, (pack(*front, flat[i], flat[i + 1], flat[i + 2], *back) + tail,)) for i in range(0, len(flat), 3)
    ]


def pack_short(version: int, session: int, seq: int, ack: int, packed: bytes) -> bytes:
    """A short frame with what ``pack_envelope`` made."""
    return _HEAD.pack(MARK, version, session, seq, ack) + packed


Numbers: TypeAlias = tuple[int, ...]
"""What stands in a short frame at fixed places, in this order; see ``MARK_AT`` and what follows."""


class Packed(NamedTuple):
    """An envelope that a hop passes on as it came, in the form of a short frame. An item of a session."""

    short: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that the item occupies in windows: as many as the envelope would."""
        short = self.short
        return len(short) - _ENVELOPE.size - short[2] + FLAT_BYTES

    @property
    def buffers(self) -> list[Buffer]:
        """What follows the frame: nothing."""
        return []


class Arrived(NamedTuple):
    """An envelope that came in the form of a short frame, its numbers read and checked. An item of a session."""

    numbers: Numbers
    short: bytes


(
    MARK_AT, VERSION_AT, SESSION, SEQ, ACK, KIND, FLAGS, METHOD_BYTES, RID, SOURCE_MESH, SOURCE_RANK,
    SOURCE_INCARNATION, MESH, RANK, INCARNATION, POSITION, SIZE, TRACE, LEFT,
) = range(19)  # fmt: skip


def read_numbers(data: bytes, version: int) -> Numbers:
    """The numbers of a short frame, checked.

    Raises:
        MalformedFrame: too short, of another version, of unknown kind, or a number is out of range.
    """
    try:
        numbers: Numbers = _WHOLE.unpack_from(data)
    except struct.error:
        raise malformed("a short frame that is too short") from None
    if numbers[VERSION_AT] != version or not numbers[SEQ]:
        raise malformed("a short frame of another version, or without a number")
    return _checked(numbers)


def read_packed(short: bytes) -> Arrived:
    """The envelope's part of a short frame where it stands among the items of a DATA frame.

    Raises:
        MalformedFrame: too short, of unknown kind, or a number is out of range.
    """
    try:
        numbers = _NO_HEAD + _ENVELOPE.unpack_from(short)
    except struct.error:
        raise malformed("a short envelope that is too short") from None
    return _tuple(Arrived, (_checked(numbers), short))


def _checked(numbers: Numbers) -> Numbers:
    if max(numbers) > MAX_NUMBER or numbers[LEFT] > MAX_REMAINING_MS + 1 or numbers[METHOD_BYTES] > MAX_METHOD_CHARS:
        raise malformed("a number of a short frame is out of range")
    if numbers[KIND] not in KIND_NAMES:
        raise malformed("a short frame of unknown kind")
    return numbers


def short_of(data: bytes) -> bytes:
    """The envelope's part of a short frame."""
    return data[_HEAD.size :]


def method_of(numbers: Numbers, short: bytes) -> str:
    """The method. Raises MalformedFrame if it is not text."""
    try:
        return str(short[_ENVELOPE.size : _ENVELOPE.size + numbers[METHOD_BYTES]], "utf-8")
    except UnicodeDecodeError:
        raise malformed("the method of a short frame is not text") from None


def packed_of(short: bytes) -> Packed:
    """To pass on what came."""
    return _tuple(Packed, (short,))


def envelope_of(numbers: Numbers, short: bytes, now: float) -> Envelope:
    """The envelope whose numbers were read. Raises MalformedFrame if its method is not text."""
    (
        _, _, _, _, _, kind, flags, method_bytes, rid, source_mesh, source_rank, source_incarnation,
        mesh, rank, incarnation, position, size, trace, left,
    ) = numbers  # fmt: skip
    return Envelope(
        kind, rid, _tuple(Address, (source_mesh, source_rank, source_incarnation)), mesh, (rank, incarnation, position),
        size, method_of(numbers, short), now + (left - 1) / 1000 if left else None, flags, trace,
        short[_ENVELOPE.size + method_bytes :], [], short,
    )  # fmt: skip


def parse_short(data: bytes, version: int, now: float) -> tuple[int, int, int, Envelope]:
    """Session, number, acknowledgement and envelope of a short frame. Raises MalformedFrame."""
    numbers = read_numbers(data, version)
    return numbers[SESSION], numbers[SEQ], numbers[ACK], envelope_of(numbers, short_of(data), now)
