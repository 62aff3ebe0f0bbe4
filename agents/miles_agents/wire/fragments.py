"""Large messages in pieces: so that what is small, above all a beat, never waits long behind them. Pure; no I/O.

Consumes: envelopes to send; numbered items of a peer. Produces: the items that a session numbers; the peer's whole
envelopes. A session counts each item on its own, so a connection that breaks costs the pieces under way, not the
message. Three kinds of item stand in a DATA frame, told apart by their length:

========  ==========================================  ====================================================
length    fields                                      meaning
========  ==========================================  ====================================================
14        see ``wire/envelope.py``                    a whole envelope; its buffers follow
2         [bytes of the buffer, bytes of this piece]  the next piece of a buffer; the piece follows
3         [envelope, buffer sizes, body size]         what the pieces before it were for; nothing follows
========  ==========================================  ====================================================

The pieces of a message come in the order of its buffers, with no other message in between; the body comes last, if it
is cut too (size 0: it is not), and an empty buffer has no piece. Invariants: the sender copies nothing; the receiver
copies each buffer once, into memory that grows as bytes really come, whatever the peer announces; a run of pieces that
breaks the rules is malformed as a whole frame, and changes nothing. An item that is bytes and no list is a whole
envelope, too, in the form of a short frame (``wire/short_frame.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from miles_agents.wire.envelope import (
    FLAT_BYTES,
    MAX_BUFFERS,
    MAX_MESSAGE_BYTES,
    Envelope,
    buffer_bytes,
    envelope_from_plain,
    is_natural,
    malformed,
)
from miles_agents.wire.short_frame import Arrived, read_packed
from miles_agents.wire.transport import MAX_FRAME_BYTES, Buffer


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of a buffer that has ``total`` bytes."""

    total: int
    piece: Buffer

    @property
    def num_bytes(self) -> int:
        """Bytes that the item occupies in windows."""
        return len(self.piece) + FLAT_BYTES

    @property
    def buffers(self) -> list[Buffer]:
        """What follows the frame."""
        return [self.piece]

    def to_plain(self, now: float) -> list[Any]:
        """The wire form."""
        return [self.total, len(self.piece)]


@dataclass(frozen=True, slots=True)
class Head:
    """An envelope whose buffers (and body, if ``body_bytes``) went before it in pieces."""

    envelope: Envelope
    sizes: list[int]
    body_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the item occupies in windows."""
        return self.envelope.num_bytes + 8 * len(self.sizes)

    @property
    def buffers(self) -> list[Buffer]:
        """What follows the frame: nothing."""
        return []

    def to_plain(self, now: float) -> list[Any]:
        """The wire form."""
        return [self.envelope.to_plain(now), self.sizes, self.body_bytes]


Item: TypeAlias = Envelope | Arrived | Fragment | Head
Whole: TypeAlias = Envelope | Arrived


def cut(envelope: Envelope, fragment_bytes: int) -> Iterator[Envelope | Fragment | Head]:
    """The items of a message, no piece larger than ``fragment_bytes``: itself alone, if it is not larger as a whole."""
    if envelope.num_bytes <= fragment_bytes:
        yield envelope
        return
    cuts_body = len(envelope.body) > fragment_bytes // 2
    for buffer in [*envelope.buffers, envelope.body] if cuts_body else envelope.buffers:
        total = buffer_bytes(buffer)
        view = memoryview(buffer).cast("B") if total else b""
        for start in range(0, total, fragment_bytes):
            yield Fragment(total, view[start : start + fragment_bytes])
    sizes = [buffer_bytes(buffer) for buffer in envelope.buffers]
    body = b"" if cuts_body else envelope.body
    yield Head(replace(envelope, buffers=[], body=body, short=None), sizes, len(envelope.body) if cuts_body else 0)


def item_from_plain(plain: Any, buffers: Sequence[Buffer], now: float) -> tuple[Item, int]:
    """Read and check one item; returns it and how many of ``buffers`` it took. Raises MalformedFrame."""
    if type(plain) is bytes:
        return read_packed(plain), 0
    if type(plain) is list and len(plain) == 2:
        total, size = plain
        if not is_natural(total) or not is_natural(size) or not 0 < size <= total <= MAX_FRAME_BYTES:
            raise malformed("a piece of a buffer announces impossible sizes")
        if not buffers or buffer_bytes(buffers[0]) != size:
            raise malformed("a piece of a buffer has not the size announced")
        return Fragment(total, buffers[0]), 1
    if type(plain) is list and len(plain) == 3:
        inner, sizes, body_bytes = plain
        envelope, _ = envelope_from_plain(inner, [], now)
        if (
            type(sizes) is not list
            or len(sizes) > MAX_BUFFERS
            or not all(map(is_natural, sizes))
            or not is_natural(body_bytes)
        ):
            raise malformed("the sizes of a message in pieces are not natural numbers")
        if body_bytes and envelope.body:
            raise malformed("a message in pieces has two bodies")
        return Head(envelope, sizes, body_bytes), 0
    return envelope_from_plain(plain, buffers, now)


class _Whole(NamedTuple):
    """A buffer that is whole, and those before it: a chain, so that a step costs the same however long the run is."""

    size: int
    before: _Whole | None
    place: int
    num_bytes: int


class _Progress(NamedTuple):
    """How far a run of pieces is: its whole buffers; of the one that is not, its size and what is there."""

    whole: _Whole | None = None
    total: int = 0
    filled: int = 0


_IDLE = _Progress()


class Assembly:
    """Puts the messages of one peer together, from items in order."""

    def __init__(self) -> None:
        self._progress = _IDLE
        self._buffers: list[bytearray] = []

    @property
    def is_idle(self) -> bool:
        """Whether no message is half there."""
        return self._progress is _IDLE

    def take(self, items: list[Item]) -> list[Whole]:
        """The messages that ``items`` complete. Raises MalformedFrame if they do not fit; nothing changes then."""
        if self._progress is _IDLE:
            whole: list[Whole] = [item for item in items if type(item) is Arrived or type(item) is Envelope]
            if len(whole) == len(items):
                return whole
        steps = [self._progress]
        for item in items:
            steps.append(_after(steps[-1], item))
        found: list[Whole] = []
        for before, item in zip(steps, items, strict=False):
            if isinstance(item, Fragment):
                self._append(item.piece, is_new=not before.filled)
            else:
                found.append(self._finish(item) if isinstance(item, Head) else item)
        self._progress = steps[-1]
        return found

    def _append(self, piece: Buffer, *, is_new: bool) -> None:
        if is_new:
            self._buffers.append(bytearray())
        self._buffers[-1] += piece

    def _finish(self, head: Head) -> Envelope:
        pieced, self._buffers = self._buffers, []
        body = bytes(pieced.pop()) if head.body_bytes else head.envelope.body
        filled = iter(pieced)
        buffers: list[Buffer] = [memoryview(next(filled)) if size else b"" for size in head.sizes]
        return replace(head.envelope, body=body, buffers=buffers, short=None)


def _after(progress: _Progress, item: Item) -> _Progress:
    """Where an item leads. Raises MalformedFrame if it does not belong there."""
    if isinstance(item, Fragment):
        return _with_piece(progress, item)
    if isinstance(item, Head):
        whole = progress.whole
        for size in reversed([size for size in (*item.sizes, item.body_bytes) if size]):
            if whole is None or whole.size != size:
                raise malformed("a message in pieces is not what its pieces were")
            whole = whole.before
        if progress.filled or whole is not None:
            raise malformed("a message in pieces is less than its pieces were")
    elif progress.filled or progress.whole is not None:
        raise malformed("a message comes between the pieces of another")
    return _IDLE


def _with_piece(progress: _Progress, item: Fragment) -> _Progress:
    whole, total, filled = progress
    count, num_bytes = (whole.place, whole.num_bytes) if whole is not None else (0, 0)
    if filled and item.total != total:
        raise malformed("the pieces of a buffer differ on its size")
    if count >= MAX_BUFFERS or num_bytes + item.total > MAX_MESSAGE_BYTES:
        raise malformed("a message in pieces is larger than any may be")
    filled += len(item.piece)
    if filled > item.total:
        raise malformed("the pieces of a buffer exceed its size")
    if filled < item.total:
        return _Progress(whole, item.total, filled)
    return _Progress(_Whole(item.total, whole, count + 1, num_bytes + item.total))
