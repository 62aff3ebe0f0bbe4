"""A session: the numbered conversation of two processes, over connections that come and go. Pure; no I/O.

Consumes: envelopes to send; frames of the peer. Produces: link frames; the peer's envelopes, in order, each once.
With ``fragment_bytes`` a large envelope goes in pieces (``wire/fragments.py``), each an item with a number of its own;
together with a small window that bounds how long a frame without a number (a beat) waits behind data.
Waits for: acknowledgements, within a window of bytes and messages. What unblocks it: any frame of the peer (all
carry an acknowledgement), or the reconnect that resumes it.

A link frame is one msgpack array ``[version, kind, session, seq, ack, payload]``:

=========  ============================  =============================================
kind       seq                           payload
=========  ============================  =============================================
HELLO      0                             dict: who dials, what it offers
WELCOME    0                             dict: what the acceptor grants
REFUSE     0                             dict: code and reason
RESET      0                             None: "say HELLO first"
DATA       number of the first item      list of items; buffers follow as frames
ACK        0                             None
RESEND     first number that is missing  None
BEAT       highest number sent           [beat id, dict of facts]
ANSWER     highest number sent           [beat id, dict of facts]
GOODBYE    0                             text: the reason
=========  ============================  =============================================

``ack`` is the highest number up to which everything was received. Invariants: numbers are given when an envelope is
accepted, so order is decided once; an item is kept until acknowledged; a number is delivered once; a frame whose
session differs is dropped, whoever sends it; no frame of a peer, however wrong, makes this end forget what it never
sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgpack

from miles_agents.wire.envelope import (
    MAX_MESSAGE_BYTES,
    Envelope,
    are_natural,
    buffer_bytes,
    check_sendable,
    is_natural,
    malformed,
)
from miles_agents.wire.fragments import Assembly, Fragment, Head, Item, Whole, cut, item_from_plain
from miles_agents.wire.short_frame import Packed, pack_envelope, pack_short, packed_of
from miles_agents.wire.transport import Buffer

VERSION = 1
HELLO, WELCOME, REFUSE, RESET, DATA, ACK, RESEND, BEAT, ANSWER, GOODBYE = range(1, 11)

WINDOW_BYTES = 64 * 1024 * 1024
WINDOW_MESSAGES = 4096
BATCH_MESSAGES = 256
BATCH_BYTES = 1024 * 1024
ACK_MESSAGES = 64
ACK_BYTES = 4 * 1024 * 1024
_tuple = tuple.__new__


@dataclass(frozen=True, slots=True)
class Pace:
    """How much of a session may be under way. ``fragment_bytes`` None: messages go whole, whatever their size."""

    fragment_bytes: int | None = None
    window_bytes: int = WINDOW_BYTES
    window_messages: int = WINDOW_MESSAGES


LOCAL = Pace()
"""Between processes of one node, where bytes cost nothing but a copy."""
NETWORK = Pace(fragment_bytes=1024 * 1024, window_bytes=8 * 1024 * 1024)
"""Between nodes: what is under way passes in time for a beat behind it, also at a few MB/s."""


class Frame(NamedTuple):
    """A parsed link frame. ``payload`` is checked only as far as the kind demands."""

    kind: int
    session: int
    seq: int
    ack: int
    payload: Any


Outbound: TypeAlias = Envelope | Packed | Fragment | Head
"""What a session numbers."""


class Numbered(NamedTuple):
    """An item with the place in the conversation that it was given."""

    seq: int
    item: Outbound
    num_bytes: int


class Batch(NamedTuple):
    """One DATA message ready for the transport, and the first number in it (to take it back if unsendable)."""

    first_seq: int
    frames: list[Buffer]


@dataclass(slots=True)
class SessionStats:
    """What a session did about loss."""

    delivered: int = 0
    repeated: int = 0
    gaps: int = 0
    resent: int = 0


def pack_frame(kind: int, session: int, seq: int, ack: int, payload: Any) -> bytes:
    """One link frame as bytes."""
    packed: bytes = msgpack.packb((VERSION, kind, session, seq, ack, payload))
    return packed


def parse_frame(data: Buffer) -> Frame:
    """Read and check a link frame. Raises MalformedFrame."""
    try:
        plain = msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:  # noqa: BLE001 - the parser raises many kinds; all of them mean garbage
        raise malformed(f"a link frame is not msgpack: {type(error).__name__}") from None
    if type(plain) is not list or len(plain) != 6:
        raise malformed("a link frame is not an array of 6 fields")
    version, kind, session, seq, ack, payload = plain
    if version != VERSION or type(version) is not int:
        # Only a number is quoted: the repr of what a stranger nested deeply enough raises.
        raise malformed(f"protocol version {version if is_natural(version) else '?'}, this side speaks {VERSION}")
    if not are_natural((kind, session, seq, ack)):
        raise malformed("a numeric field of a link frame is not a natural number")
    if not HELLO <= kind <= GOODBYE:
        raise malformed("a link frame of unknown kind")
    if kind in (DATA, RESEND) and seq == 0:
        raise malformed("a number of an envelope is 0; they begin at 1")
    return _tuple(Frame, (kind, session, seq, ack, payload))


def parse_items(payload: Any, buffers: Sequence[Buffer], now: float) -> list[Item]:
    """The items of a DATA frame with the buffers that belong to each. Raises MalformedFrame."""
    if type(payload) is not list:
        raise malformed("the payload of DATA is not a list")
    items: list[Item] = []
    used = 0
    for plain in payload:
        item, taken = item_from_plain(plain, buffers[used:] if used else buffers, now)
        items.append(item)
        used += taken
    if used != len(buffers):
        raise malformed(f"{len(buffers) - used} buffers belong to no envelope")
    return items


class Session:
    """One end of a session. See the module's docstring for its contract."""

    def __init__(self, session_id: int, pace: Pace = LOCAL) -> None:
        self.session_id = session_id
        self.stats = SessionStats()
        self.received = 0
        self._pace = pace
        self._whole_bytes = MAX_MESSAGE_BYTES if pace.fragment_bytes is None else pace.fragment_bytes
        self._max_unacked = pace.window_messages
        self._max_bytes = pace.window_bytes
        self._ack_bytes = min(ACK_BYTES, pace.window_bytes // 8)
        self._assembly = Assembly()
        self._next_seq = 1
        self._highest_sent = 0
        self.waiting: deque[Numbered] = deque()
        """Accepted, not on the wire yet."""
        self._unacked: deque[Numbered] = deque()
        self._unacked_bytes = 0
        self._ack_owed_messages = 0
        self._ack_owed_bytes = 0
        self._resend_asked_for = 0

    # -- sending ---------------------------------------------------------------------------------------------

    @property
    def last_sent(self) -> int:
        """Highest number that was put on the wire at least once and not taken back."""
        if self.waiting:
            return self.waiting[0].seq - 1
        return self._next_seq - 1

    @property
    def num_unacknowledged(self) -> int:
        """Items that the peer has not acknowledged, sent or not."""
        return len(self._unacked) + len(self.waiting)

    def send(self, envelope: Envelope | Packed) -> None:
        """Accept an envelope: give it its number (or numbers) and keep it until the peer has it.

        Raises:
            UnsendableMessage: no peer would take it. It got no number.
        """
        if not isinstance(envelope, Packed):
            may_be_short = envelope.deadline is None and envelope.num_bytes <= self._whole_bytes
            short = pack_envelope(envelope, 0.0) if may_be_short else None
            if short is None:
                self._send_long(envelope)
                return
            envelope = packed_of(short)
        self._number(envelope)

    def _send_long(self, envelope: Envelope) -> None:
        check_sendable(envelope)
        fragment_bytes = self._pace.fragment_bytes
        if fragment_bytes is None:
            self._number(envelope)
        else:
            for item in cut(envelope, fragment_bytes):
                self._number(item)

    def send_at_once(self, envelope: Envelope | Packed, now: float) -> Batch | None:
        """Accept an envelope like ``send``; if it is one item and may go now, it is the DATA message returned.

        Raises:
            UnsendableMessage: no peer would take it. It got no number.
        """
        num_bytes = envelope.num_bytes
        unacked = self._unacked
        if (
            self.waiting
            or num_bytes > self._whole_bytes
            or (unacked and (len(unacked) >= self._max_unacked or self._unacked_bytes + num_bytes > self._max_bytes))
        ):
            self.send(envelope)
            return None
        if isinstance(envelope, Packed):
            packed: bytes | None = envelope.short
        else:
            packed = pack_envelope(envelope, now)
            if packed is None:
                check_sendable(envelope)
        seq = self._next_seq
        self._next_seq = seq + 1
        unacked.append(_tuple(Numbered, (seq, envelope, num_bytes)))
        self._unacked_bytes += num_bytes
        self._highest_sent = max(self._highest_sent, seq)
        self._ack_owed_messages = self._ack_owed_bytes = 0
        if packed is not None:
            return _tuple(Batch, (seq, [pack_short(VERSION, self.session_id, seq, self.received, packed)]))
        assert isinstance(envelope, Envelope)
        head = pack_frame(DATA, self.session_id, seq, self.received, [envelope.to_plain(now)])
        return _tuple(Batch, (seq, [head, *envelope.buffers]))

    def _number(self, item: Outbound) -> None:
        self.waiting.append(Numbered(self._next_seq, item, item.num_bytes))
        self._next_seq += 1

    def has_sendable(self) -> bool:
        """Whether ``next_batch`` would return something."""
        return bool(self.waiting) and self._fits(self.waiting[0].num_bytes)

    def next_batch(self, now: float) -> Batch | None:
        """The next DATA message that the window allows, or None. It counts as sent."""
        if not self.has_sendable():
            return None
        first = self.waiting[0].seq
        plains: list[Any] = []
        buffers: list[Buffer] = []
        total = 0
        while self.waiting and len(plains) < BATCH_MESSAGES:
            numbered = self.waiting[0]
            if plains and (total + numbered.num_bytes > BATCH_BYTES or not self._fits(numbered.num_bytes)):
                break
            self.waiting.popleft()
            self._unacked.append(numbered)
            self._unacked_bytes += numbered.num_bytes
            total += numbered.num_bytes
            item = numbered.item
            if isinstance(item, Packed):
                plains.append(item.short)
            else:
                plains.append(item.to_plain(now))
                buffers.extend(item.buffers)
        self._highest_sent = max(self._highest_sent, self._unacked[-1].seq)
        head = pack_frame(DATA, self.session_id, first, self._acknowledge(), plains)
        return Batch(first, [head, *buffers])

    def rewind(self, seq: int) -> None:
        """Items from ``seq`` on have to be sent again (unsendable, lost, or the link is new)."""
        while self._unacked and self._unacked[-1].seq >= seq:
            numbered = self._unacked.pop()
            self._unacked_bytes -= numbered.num_bytes
            self.waiting.appendleft(numbered)
            self.stats.resent += 1

    def on_ack(self, ack: int) -> None:
        """The peer has everything up to ``ack``. Raises MalformedFrame if that was never sent; nothing changes then."""
        if not 0 <= ack <= self._highest_sent:
            raise malformed("a peer acknowledges what was never sent")
        if self._unacked:
            if self._unacked[0].seq > ack:
                return
        elif not self.waiting:
            return
        while self._unacked and self._unacked[0].seq <= ack:
            self._unacked_bytes -= self._unacked.popleft().num_bytes
        while not self._unacked and self.waiting and self.waiting[0].seq <= ack:
            self.waiting.popleft()

    def on_resend(self, seq: int) -> None:
        """The peer misses ``seq``. Only the first number that it did not acknowledge can be missing: more is stale."""
        if self._unacked and self._unacked[0].seq == seq:
            self.rewind(seq)

    def resume(self, peer_received: int) -> None:
        """The link is new; the peer has everything up to ``peer_received``. Raises MalformedFrame like ``on_ack``."""
        self.on_ack(peer_received)
        self.rewind(peer_received + 1)
        self._resend_asked_for = 0

    # -- receiving -------------------------------------------------------------------------------------------

    def on_data(self, seq: int, items: list[Item], num_bytes: int) -> list[Whole]:
        """Items numbered from ``seq`` (at least 1); returns the envelopes that are new, whole and in order.

        Raises MalformedFrame if a message in pieces is none; nothing changes then.
        """
        if seq > self.received + 1:
            self.stats.gaps += 1
            return []
        fresh = items[self.received + 1 - seq :] if seq <= self.received else items
        envelopes = self._assembly.take(fresh)
        self.stats.repeated += len(items) - len(fresh)
        self.received += len(fresh)
        self.stats.delivered += len(envelopes)
        self._ack_owed_messages += len(items)
        self._ack_owed_bytes += num_bytes
        return envelopes

    def take_next(self, seq: int, ack: int, num_bytes: int) -> bool:
        """``on_ack`` and ``on_data`` in one, for a frame with one whole envelope that is the next: nearly all are.

        False: it is not the next, or the numbers need a closer look; nothing was changed.
        """
        unacked = self._unacked
        if seq != self.received + 1 or self.waiting or not self._assembly.is_idle or ack > self._highest_sent:
            return False
        while unacked and unacked[0].seq <= ack:
            self._unacked_bytes -= unacked.popleft().num_bytes
        self.received += 1
        self.stats.delivered += 1
        self._ack_owed_messages += 1
        self._ack_owed_bytes += num_bytes
        return True

    def missing(self, peer_last_sent: int) -> int | None:
        """First number to ask for again, given how far the peer says it is; None if nothing is to be asked.

        Each gap is asked for once per call with news; a beat (``forget_asked``) allows to ask again.
        """
        wanted = self.received + 1
        if peer_last_sent < wanted or self._resend_asked_for == wanted:
            return None
        self._resend_asked_for = wanted
        return wanted

    def forget_asked(self) -> None:
        """A request to send again may itself have been lost: allow to repeat it."""
        self._resend_asked_for = 0

    def ack_due(self) -> bool:
        """Enough was received since the last acknowledgement to send one on its own."""
        return self._ack_owed_messages >= ACK_MESSAGES or self._ack_owed_bytes >= self._ack_bytes

    def control(self, kind: int, payload: Any = None, *, seq: int = 0) -> list[Buffer]:
        """A frame that carries no envelopes; it acknowledges like any other."""
        return [pack_frame(kind, self.session_id, seq, self._acknowledge(), payload)]

    def _acknowledge(self) -> int:
        self._ack_owed_messages = 0
        self._ack_owed_bytes = 0
        return self.received

    def _fits(self, num_bytes: int) -> bool:
        if not self._unacked:
            return True
        return len(self._unacked) < self._max_unacked and self._unacked_bytes + num_bytes <= self._max_bytes


def total_bytes(frames: Sequence[Buffer]) -> int:
    """Bytes of a message with all its frames."""
    return sum(map(buffer_bytes, frames))
