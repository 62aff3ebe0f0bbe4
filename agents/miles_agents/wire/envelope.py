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
from miles_agents.wire.transport import Buffer

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

NO_DEADLINE = -1
MAX_METHOD_CHARS = 200


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

    @property
    def num_bytes(self) -> int:
        """Bytes that the message occupies in windows: body, buffers and a flat cost for the header."""
        total = len(self.body) + 64
        for buffer in self.buffers:
            total += buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
        return total

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
        remaining = NO_DEADLINE if self.deadline is None else max(0, int((self.deadline - now) * 1000))
        source = self.source
        sizes = [b.nbytes if isinstance(b, memoryview) else len(b) for b in self.buffers]
        return [
            self.kind, self.rid, source[0], source[1], source[2], self.mesh, self.targets, self.size,
            self.method, remaining, self.flags, self.trace, sizes, self.body,
        ]  # fmt: skip


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
    for number in (kind, rid, src_mesh, src_rank, src_inc, mesh, size, remaining, flags, trace):
        if type(number) is not int:
            raise malformed("a numeric field of an envelope is not an integer")
    if kind not in KIND_NAMES or rid < 0 or remaining < NO_DEADLINE:
        raise malformed(f"envelope with kind {kind}, request {rid}, remaining {remaining}")
    if type(method) is not str or type(body) is not bytes or len(method) > MAX_METHOD_CHARS:
        raise malformed("an envelope's method or body has the wrong type")
    flat = _flat_targets(targets)
    taken = _matching_buffers(sizes, buffers)
    deadline = None if remaining == NO_DEADLINE else now + remaining / 1000
    source = Address(src_mesh, src_rank, src_inc)
    envelope = Envelope(kind, rid, source, mesh, flat, size, method, deadline, flags, trace, body, taken)
    return envelope, len(taken)


def _flat_targets(targets: Any) -> tuple[int, ...]:
    if type(targets) is not list or not targets or len(targets) % 3:
        raise malformed("an envelope's targets are not triples")
    for number in targets:
        if type(number) is not int or number < 0:
            raise malformed("an envelope's targets are not numbers")
    return tuple(targets)


def _matching_buffers(sizes: Any, buffers: Sequence[Buffer]) -> list[Buffer]:
    if type(sizes) is not list or len(sizes) > len(buffers):
        raise malformed("an envelope announces buffers that did not come")
    taken = list(buffers[: len(sizes)])
    for size, buffer in zip(sizes, taken, strict=True):
        if size != (buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)):
            raise malformed("a buffer's size differs from the one announced")
    return taken


def malformed(why: str) -> MalformedFrame:
    """The one error for bytes that break the protocol."""
    return MalformedFrame(
        "a peer sent bytes that are not of this protocol",
        evidence=why,
        advice="Check that controller and agents run the same version of this package.",
    )
