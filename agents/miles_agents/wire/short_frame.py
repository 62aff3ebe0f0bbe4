"""The short form of a DATA frame: one whole envelope, one receiver, no buffers. Nearly every message is such.

It says exactly what the msgpack form says (``wire/session.py``, ``wire/envelope.py``), in fixed places, so that a hop
reads and checks it in one step, and passes the envelope on without making it anew. All numbers are little-endian::

    0   mark 0xC1 (no msgpack begins so), version, 6 bytes of zero
    8   session, seq, ack                                                     64 bit each
    32  kind, flags, bytes of the method                                       8 bit each, 5 bytes of zero
    40  rid, source mesh, rank, incarnation, mesh, rank, incarnation, position,
        size, trace, remaining ms + 1 (0: no deadline)                        64 bit each
    128 method (UTF-8), body
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, TypeAlias

from miles_agents.wire.envelope import (
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
_BODY = _WHOLE.size
_MAX_BODY_BYTES = ZERO_COPY_BYTES - _BODY - 4 * MAX_METHOD_CHARS - 1
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


def pack_short(version: int, session: int, seq: int, ack: int, packed: bytes) -> bytes:
    """A short frame with what ``pack_envelope`` made."""
    return _HEAD.pack(MARK, version, session, seq, ack) + packed


class Packed(NamedTuple):
    """An envelope that a hop passes on as it came, in the form of a short frame. An item of a session."""

    short: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that the item occupies in windows."""
        return len(self.short)

    @property
    def buffers(self) -> list[Buffer]:
        """What follows the frame: nothing."""
        return []

    def to_plain(self, now: float) -> list[Any]:
        """The long form of the wire, for when it travels together with others."""
        data = bytes(_HEAD.size) + self.short
        return envelope_of(_WHOLE.unpack_from(data), data, now).to_plain(now)


Numbers: TypeAlias = tuple[int, ...]
"""What stands in a short frame at fixed places, in this order; see ``MARK_AT`` and what follows."""

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
    if max(numbers) > MAX_NUMBER or numbers[LEFT] > MAX_REMAINING_MS + 1 or numbers[METHOD_BYTES] > MAX_METHOD_CHARS:
        raise malformed("a number of a short frame is out of range")
    if numbers[VERSION_AT] != version or numbers[KIND] not in KIND_NAMES or not numbers[SEQ]:
        raise malformed("a short frame of another version, of unknown kind, or without a number")
    return numbers


def method_of(numbers: Numbers, data: bytes) -> str:
    """The method. Raises MalformedFrame if it is not text."""
    try:
        return str(data[_BODY : _BODY + numbers[METHOD_BYTES]], "utf-8")
    except UnicodeDecodeError:
        raise malformed("the method of a short frame is not text") from None


def packed_of(data: bytes) -> Packed:
    """The envelope of a short frame, to pass on."""
    return _tuple(Packed, (data[_HEAD.size :],))


def envelope_of(numbers: Numbers, data: bytes, now: float) -> Envelope:
    """The envelope of a short frame whose numbers were read. Raises MalformedFrame if its method is not text."""
    (
        _, _, _, _, _, kind, flags, method_bytes, rid, source_mesh, source_rank, source_incarnation,
        mesh, rank, incarnation, position, size, trace, left,
    ) = numbers  # fmt: skip
    return Envelope(
        kind, rid, _tuple(Address, (source_mesh, source_rank, source_incarnation)), mesh, (rank, incarnation, position),
        size, method_of(numbers, data), now + (left - 1) / 1000 if left else None, flags, trace,
        data[_BODY + method_bytes :], [], data[_HEAD.size :],
    )  # fmt: skip


def parse_short(data: bytes, version: int, now: float) -> tuple[int, int, int, Envelope]:
    """Session, number, acknowledgement and envelope of a short frame. Raises MalformedFrame."""
    numbers = read_numbers(data, version)
    return numbers[SESSION], numbers[SEQ], numbers[ACK], envelope_of(numbers, data, now)
