"""A session: the numbered conversation of two processes, over connections that come and go. Pure; no I/O.

Consumes: envelopes to send; frames of the peer. Produces: link frames; the peer's envelopes, in order, each once.
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
DATA       number of the first envelope  list of envelopes; buffers follow as frames
ACK        0                             None
RESEND     first number that is missing  None
BEAT       highest number sent           [beat id, dict of facts]
ANSWER     highest number sent           [beat id, dict of facts]
GOODBYE    0                             text: the reason
=========  ============================  =============================================

``ack`` is the highest number up to which everything was received. Invariants: numbers are given when an envelope is
accepted, so order is decided once; an envelope is kept until acknowledged; a number is delivered once; a frame whose
session differs is dropped, whoever sends it; no frame of a peer, however wrong, makes this end forget what it never
sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from miles_agents.wire.envelope import Envelope, check_sendable, envelope_from_plain, is_natural, malformed
from miles_agents.wire.transport import Buffer

VERSION = 1
HELLO, WELCOME, REFUSE, RESET, DATA, ACK, RESEND, BEAT, ANSWER, GOODBYE = range(1, 11)

WINDOW_BYTES = 64 * 1024 * 1024
WINDOW_MESSAGES = 4096
BATCH_MESSAGES = 256
BATCH_BYTES = 1024 * 1024
ACK_MESSAGES = 64
ACK_BYTES = 4 * 1024 * 1024


class Frame(NamedTuple):
    """A parsed link frame. ``payload`` is checked only as far as the kind demands."""

    kind: int
    session: int
    seq: int
    ack: int
    payload: Any


class Numbered(NamedTuple):
    """An envelope with the place in the conversation that it was given."""

    seq: int
    envelope: Envelope
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
    if type(version) is not int or version != VERSION:
        # Only a number is quoted: the repr of what a stranger nested deeply enough raises.
        raise malformed(f"protocol version {version if is_natural(version) else '?'}, this side speaks {VERSION}")
    for number in (kind, session, seq, ack):
        if not is_natural(number):
            raise malformed("a numeric field of a link frame is not a natural number")
    if not HELLO <= kind <= GOODBYE:
        raise malformed("a link frame of unknown kind")
    if kind in (DATA, RESEND) and seq == 0:
        raise malformed("a number of an envelope is 0; they begin at 1")
    return Frame(kind, session, seq, ack, payload)


def parse_envelopes(payload: Any, buffers: Sequence[Buffer], now: float) -> list[Envelope]:
    """The envelopes of a DATA frame with the buffers that belong to each. Raises MalformedFrame."""
    if type(payload) is not list:
        raise malformed("the payload of DATA is not a list")
    envelopes = []
    used = 0
    for plain in payload:
        envelope, taken = envelope_from_plain(plain, buffers[used:] if used else buffers, now)
        envelopes.append(envelope)
        used += taken
    if used != len(buffers):
        raise malformed(f"{len(buffers) - used} buffers belong to no envelope")
    return envelopes


class Session:
    """One end of a session. See the module's docstring for its contract."""

    def __init__(
        self, session_id: int, *, window_bytes: int = WINDOW_BYTES, window_messages: int = WINDOW_MESSAGES
    ) -> None:
        self.session_id = session_id
        self.stats = SessionStats()
        self.received = 0
        self._window_bytes = window_bytes
        self._window_messages = window_messages
        self._next_seq = 1
        self._highest_sent = 0
        self._waiting: deque[Numbered] = deque()
        self._unacked: deque[Numbered] = deque()
        self._unacked_bytes = 0
        self._ack_owed_messages = 0
        self._ack_owed_bytes = 0
        self._resend_asked_for = 0

    # -- sending ---------------------------------------------------------------------------------------------

    @property
    def last_sent(self) -> int:
        """Highest number that was put on the wire at least once and not taken back."""
        if self._waiting:
            return self._waiting[0].seq - 1
        return self._next_seq - 1

    @property
    def num_unacknowledged(self) -> int:
        """Envelopes that the peer has not acknowledged, sent or not."""
        return len(self._unacked) + len(self._waiting)

    def send(self, envelope: Envelope) -> None:
        """Accept an envelope: give it its number and keep it until the peer has it.

        Raises:
            UnsendableMessage: no peer would take it. It got no number.
        """
        check_sendable(envelope)
        self._waiting.append(Numbered(self._next_seq, envelope, envelope.num_bytes))
        self._next_seq += 1

    def has_sendable(self) -> bool:
        """Whether ``next_batch`` would return something."""
        return bool(self._waiting) and self._fits(self._waiting[0].num_bytes)

    def next_batch(self, now: float) -> Batch | None:
        """The next DATA message that the window allows, or None. It counts as sent."""
        if not self.has_sendable():
            return None
        first = self._waiting[0].seq
        plains: list[Any] = []
        buffers: list[Buffer] = []
        total = 0
        while self._waiting and len(plains) < BATCH_MESSAGES:
            numbered = self._waiting[0]
            if plains and (total + numbered.num_bytes > BATCH_BYTES or not self._fits(numbered.num_bytes)):
                break
            self._waiting.popleft()
            self._unacked.append(numbered)
            self._unacked_bytes += numbered.num_bytes
            total += numbered.num_bytes
            plains.append(numbered.envelope.to_plain(now))
            buffers.extend(numbered.envelope.buffers)
        self._highest_sent = max(self._highest_sent, self._unacked[-1].seq)
        head = pack_frame(DATA, self.session_id, first, self._acknowledge(), plains)
        return Batch(first, [head, *buffers])

    def rewind(self, seq: int) -> None:
        """Envelopes from ``seq`` on have to be sent again (unsendable, lost, or the link is new)."""
        while self._unacked and self._unacked[-1].seq >= seq:
            numbered = self._unacked.pop()
            self._unacked_bytes -= numbered.num_bytes
            self._waiting.appendleft(numbered)
            self.stats.resent += 1

    def on_ack(self, ack: int) -> None:
        """The peer has everything up to ``ack``. Raises MalformedFrame if that was never sent; nothing changes then."""
        if not 0 <= ack <= self._highest_sent:
            raise malformed("a peer acknowledges what was never sent")
        while self._unacked and self._unacked[0].seq <= ack:
            self._unacked_bytes -= self._unacked.popleft().num_bytes
        while not self._unacked and self._waiting and self._waiting[0].seq <= ack:
            self._waiting.popleft()

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

    def on_data(self, seq: int, envelopes: list[Envelope], num_bytes: int) -> list[Envelope]:
        """Envelopes numbered from ``seq`` (at least 1); returns those that are new and in order."""
        if seq > self.received + 1:
            self.stats.gaps += 1
            return []
        fresh = envelopes[self.received + 1 - seq :]
        self.stats.repeated += len(envelopes) - len(fresh)
        self.received += len(fresh)
        self.stats.delivered += len(fresh)
        self._ack_owed_messages += len(envelopes)
        self._ack_owed_bytes += num_bytes
        return fresh

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
        return self._ack_owed_messages >= ACK_MESSAGES or self._ack_owed_bytes >= ACK_BYTES

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
        return len(self._unacked) < self._window_messages and self._unacked_bytes + num_bytes <= self._window_bytes


def total_bytes(frames: Sequence[Buffer]) -> int:
    """Bytes of a message with all its frames."""
    return sum(f.nbytes if isinstance(f, memoryview) else len(f) for f in frames)
