"""The envelope: what every hop reads of a message, and all that it reads.

On the wire an envelope is one positional msgpack array inside a link frame (``wire/session.py``):

    [kind, rid, source mesh, source rank, source incarnation, mesh, targets, size,
     method, remaining ms, flags, trace, buffer sizes, body]

``targets`` is flat, three numbers per receiver: rank, incarnation, position in the mesh that was called. The
body is opaque to hops. Buffers follow as frames of their own. A deadline is an absolute time on the local clock
while a process holds the envelope and remaining milliseconds on the wire, so that every hop takes off what it
spent and no two clocks are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from miles_agents.errors import PeerFault
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.transport import MAX_FRAME_BYTES, Buffer

CALL, REPLY, ERROR, ITEM, END, CREDIT, CANCEL, STARTED = range(1, 9)
KIND_NAMES = {
    CALL: "call",
    REPLY: "reply",
    ERROR: "error",
    ITEM: "item",
    END: "end",
    CREDIT: "credit",
    CANCEL: "cancel",
    STARTED: "started",
}

ONE_WAY = 1
"""Flag of a call: answer STARTED when it is taken from the queue, nothing afterwards."""
STREAM = 2
"""Flag of a call: the caller takes items and grants credits."""

FLAT_BYTES = 64
"""What a message costs in windows besides its bytes."""
NO_DEADLINE = -1
MAX_METHOD_CHARS = 200
MAX_INLINE_BYTES = MAX_FRAME_BYTES - 16 * 1024 * 1024
"""The body shares a frame with the headers of its batch, so it has to leave them room."""
MAX_MESSAGE_BYTES = 4 * 1024 * 1024 * 1024
"""Of all buffers and the body together."""
MAX_BUFFERS = 100_000
MAX_NUMBER = 2**63 - 1
"""Numbers of an envelope lie between 0 and this."""
MAX_REMAINING_MS = 2**53
_INTS = {int}
_tuple = tuple.__new__
"""Makes a named tuple without the detour through its own, slower constructor."""


class MalformedFrame(PeerFault):
    """Bytes of a peer do not follow the protocol. They are counted and dropped."""

    code = "E-WIRE-001"


class Address(NamedTuple):
    """One life of one actor's process."""

    mesh: int
    rank: int
    incarnation: int


CONTROLLER_MESH = 0
AGENT_MESH = 1
FIRST_USER_MESH = 2


class Target(NamedTuple):
    """One receiver of a message, and its position in the mesh that was called."""

    rank: int
    incarnation: int
    position: int


@dataclass(slots=True)
class Envelope:
    """One message. ``deadline`` is in the holder's ``loop.time()``; None is no deadline."""

    kind: int
    rid: int
    source: Address
    mesh: int
    targets: tuple[int, ...]
    size: int = 1
    method: str = ""
    deadline: float | None = None
    flags: int = 0
    trace: int = 0
    body: bytes = b""
    buffers: list[Buffer] = field(default_factory=list)
    short: bytes | None = field(default=None, compare=False, repr=False)
    """Its part of the short frame that it came in (``wire/short_frame.py``): a hop passes it on as it is."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the message occupies in windows: body, buffers and a flat cost for the header."""
        total = len(self.body) + FLAT_BYTES
        if not self.buffers:
            return total
        for buffer in self.buffers:
            total += buffer_bytes(buffer)
        return total

    @property
    def target(self) -> Target:
        """The first (mostly only) receiver."""
        flat = self.targets
        return _tuple(Target, flat if len(flat) == 3 else flat[:3])

    def receivers(self) -> list[Target]:
        """The targets, one object each."""
        flat = self.targets
        return [Target(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]

    def to(self, receivers: Sequence[Target]) -> Envelope:
        """The same message for some of its receivers; body and buffers are shared."""
        flat = tuple(number for receiver in receivers for number in receiver)
        return Envelope(
            self.kind, self.rid, self.source, self.mesh, flat, self.size,
            self.method, self.deadline, self.flags, self.trace, self.body, self.buffers,
        )  # fmt: skip

    def answer(self, kind: int, source: Address, body: bytes = b"", buffers: list[Buffer] | None = None) -> Envelope:
        """A message back to the sender about the same request."""
        asker = self.source
        return Envelope(
            kind, self.rid, source, asker.mesh, (asker.rank, asker.incarnation, 0),
            trace=self.trace, body=body, buffers=buffers if buffers is not None else [],
        )  # fmt: skip

    def to_plain(self, now: float) -> list[Any]:
        """The wire form. ``now`` turns the deadline into remaining milliseconds (at least 0)."""
        remaining = NO_DEADLINE
        if self.deadline is not None:
            # An infinite deadline is a number too; min() makes it one that fits.
            remaining = int(max(0.0, min((self.deadline - now) * 1000, MAX_REMAINING_MS)))
        source = self.source
        sizes = [buffer_bytes(buffer) for buffer in self.buffers]
        return [
            self.kind, self.rid, source[0], source[1], source[2], self.mesh, self.targets, self.size,
            self.method, remaining, self.flags, self.trace, sizes, self.body,
        ]  # fmt: skip


def check_sendable(envelope: Envelope) -> None:
    """Whatever a peer would refuse must not enter a session: it would be sent again and again, ahead of all else.

    Raises:
        UnsendableMessage: ``envelope_from_plain`` would refuse its wire form, or a frame would be too large.
    """
    if envelope.short is not None:
        return  # it was checked when it came
    why = _unsendable(envelope)
    if why:
        raise UnsendableMessage(
            f"a {KIND_NAMES.get(envelope.kind, 'message')} of {envelope.method[:MAX_METHOD_CHARS]!r} cannot be sent",
            evidence=why,
            advice="Send bulk data through the shared store, or in parts.",
        )


def _unsendable(envelope: Envelope) -> str:
    if envelope.kind not in KIND_NAMES:
        return f"unknown kind {envelope.kind}"
    if len(envelope.method) > MAX_METHOD_CHARS:
        return f"the method's name has {len(envelope.method)} characters; limit {MAX_METHOD_CHARS}"
    targets = envelope.targets
    numbers = (envelope.rid, *envelope.source, envelope.mesh, envelope.size, envelope.flags, envelope.trace, *targets)
    if not targets or len(targets) % 3 or not are_natural(numbers):
        return f"its numbers {numbers[:7]} or its {len(targets)} target numbers are not natural, or no triples"
    if envelope.deadline is not None and envelope.deadline != envelope.deadline:
        return "its deadline is not a number"
    if type(envelope.body) is not bytes or len(envelope.body) > MAX_INLINE_BYTES:
        return f"a body of {len(envelope.body)} bytes; limit {MAX_INLINE_BYTES}"
    for buffer in envelope.buffers:
        if buffer_bytes(buffer) > MAX_FRAME_BYTES or not memoryview(buffer).c_contiguous:
            return f"a buffer of {buffer_bytes(buffer)} bytes, or not contiguous; limit {MAX_FRAME_BYTES}"
    if envelope.num_bytes > MAX_MESSAGE_BYTES or len(envelope.buffers) >= MAX_BUFFERS:
        return f"{envelope.num_bytes} bytes, {len(envelope.buffers)} buffers; limits {MAX_MESSAGE_BYTES}, {MAX_BUFFERS}"
    return ""


def is_natural(value: object) -> bool:
    """An integer that may stand on the wire; not a bool, not negative, at most 63 bits."""
    return type(value) is int and 0 <= value <= MAX_NUMBER


def are_natural(values: Sequence[Any]) -> bool:
    """``is_natural`` of all; every message asks this at every hop, so it is made of few steps."""
    return set(map(type, values)) == _INTS and min(values) >= 0 and max(values) <= MAX_NUMBER


def buffer_bytes(buffer: Buffer) -> int:
    """Bytes of a buffer, whatever its items are."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def envelope_from_plain(plain: Any, buffers: Sequence[Buffer], now: float) -> tuple[Envelope, int]:
    """Read and check one wire form; returns it and how many of ``buffers`` it took.

    Raises:
        MalformedFrame: anything but exactly the right shape.
    """
    if type(plain) is not list or len(plain) != 14:
        raise malformed("an envelope is not an array of 14 fields")
    (
        kind,
        rid,
        src_mesh,
        src_rank,
        src_inc,
        mesh,
        targets,
        size,
        method,
        remaining,
        flags,
        trace,
        sizes,
        body,
    ) = plain
    if type(targets) is not list or not targets or len(targets) % 3:
        raise malformed("an envelope's targets are not triples")
    if not are_natural((kind, rid, src_mesh, src_rank, src_inc, mesh, size, flags, trace, *targets)):
        raise malformed("a number of an envelope is not a natural number")
    if kind not in KIND_NAMES:
        raise malformed("an envelope of unknown kind")
    if type(remaining) is not int or not NO_DEADLINE <= remaining <= MAX_REMAINING_MS:
        raise malformed("an envelope's remaining milliseconds are out of range")
    if type(method) is not str or type(body) is not bytes or len(method) > MAX_METHOD_CHARS:
        raise malformed("an envelope's method or body has the wrong type")
    taken = [] if sizes == [] else _matching_buffers(sizes, buffers)
    deadline = None if remaining == NO_DEADLINE else now + remaining / 1000
    source = _tuple(Address, (src_mesh, src_rank, src_inc))
    envelope = Envelope(
        kind, rid, source, mesh, tuple(targets), size, method, deadline, flags, trace, body, taken
    )  # fmt: skip
    return envelope, len(taken)


def _matching_buffers(sizes: Any, buffers: Sequence[Buffer]) -> list[Buffer]:
    if type(sizes) is not list or len(sizes) > len(buffers):
        raise malformed("an envelope announces buffers that did not come")
    taken = list(buffers[: len(sizes)])
    for size, buffer in zip(sizes, taken, strict=True):
        if type(size) is not int or size != buffer_bytes(buffer):
            raise malformed("a buffer's size differs from the one announced")
    return taken


def malformed(why: str) -> MalformedFrame:
    """The one error for bytes that break the protocol."""
    return MalformedFrame(
        "a peer sent bytes that are not of this protocol",
        evidence=why,
        advice="Check that controller and agents run the same version of this package.",
    )
