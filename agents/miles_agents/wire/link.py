"""Links: sessions on a transport. Who is there, what was said, and how long ago.

Consumes: messages of a transport, envelopes of the node above. Produces: the peers' envelopes in order, each once;
word of peers that come (``on_peer_up``), fall silent on the wire (``on_peer_down``, a hint) or say goodbye.
Waits for: nothing; beats are sent from outside (``LinkDialer.beat``), silence is judged above (leases, membership).

A dialer says HELLO on every new connection. The acceptor asks its ``admit`` what to do: a session it knows is
resumed, a new one begins, anything else is refused with a reason. A connection that speaks before its HELLO is told
so (RESET). Invariants: one connection per peer, the newest; the key that opened a session is the only one that can
resume it; a frame that breaks the protocol is counted and dropped, and disturbs nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import Envelope, MalformedFrame, malformed
from miles_agents.wire.session import Frame, Session, parse_envelopes, parse_frame
from miles_agents.wire.transport import DIALED, Buffer, Connection, Transport


@dataclass(slots=True)
class Refusal:
    """Why a HELLO is turned away. ``final``: trying again is of no use."""

    reason: str
    final: bool = True


@dataclass(slots=True)
class Admission:
    """A HELLO is accepted: the peer's name here and what WELCOME tells it."""

    name: str
    grant: dict[str, Any] = field(default_factory=dict)


class Peer:
    """The other end of one session."""

    def __init__(self, name: str, session: Session, user_id: str, link: _Link) -> None:
        self.name = name
        self.session = session
        self.user_id = user_id
        self.connection: Connection | None = None
        self.last_heard = asyncio.get_running_loop().time()
        self._link = link
        self._flush_scheduled = False

    @property
    def is_up(self) -> bool:
        """Whether there is a connection to it now, as far as is known."""
        return self.connection is not None

    def send(self, envelope: Envelope) -> None:
        """Send in order, exactly once, now or as soon as window and connection allow."""
        self.session.send(envelope)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._link.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Put on the wire what may go now."""
        self._flush_scheduled = False
        session = self.session
        now = self._link.loop.time()
        while self.connection is not None:
            batch = session.next_batch(now)
            if batch is None:
                break
            if not self._link.transport.send(self.connection, batch.frames):
                session.rewind(batch.first_seq)
                break
        if session.ack_due():
            self.control(wire.ACK)

    def control(self, kind: int, payload: Any = None, *, seq: int = 0) -> None:
        """Send a frame without envelopes, if there is a connection; lost otherwise."""
        if self.connection is not None:
            self._link.transport.send(self.connection, self.session.control(kind, payload, seq=seq))

    def say_goodbye(self, reason: str) -> None:
        """Tell the peer that this end leaves in good order."""
        self.flush()
        self.control(wire.GOODBYE, reason)


class LinkHandler(Protocol):
    """What lies above a link."""

    def on_envelope(self, peer: Peer, envelope: Envelope) -> None:
        """The next envelope of the peer."""

    def on_peer_up(self, peer: Peer, *, resumed: bool) -> None:
        """The peer is connected; ``resumed`` if its session went on."""

    def on_peer_down(self, peer: Peer) -> None:
        """The connection is gone; a hint, not a verdict."""

    def on_beat(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        """A dialer's beat came (acceptor); returns the facts for the answer."""

    def on_answer(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> None:
        """An acceptor's answer came (dialer)."""

    def on_goodbye(self, peer: Peer, reason: str) -> None:
        """The peer leaves in good order."""


class AcceptorHandler(LinkHandler, Protocol):
    """What lies above a link that accepts."""

    def admit(self, hello: dict[str, Any], user_id: str, session_id: int) -> Admission | Refusal:
        """Judge a HELLO whose session is not known here."""


class DialerHandler(LinkHandler, Protocol):
    """What lies above a link that dials."""

    def on_welcome(self, grant: dict[str, Any]) -> None:
        """The first WELCOME of the session."""

    def on_refused(self, refusal: Refusal) -> None:
        """The acceptor does not want this session (any more)."""


@dataclass(slots=True)
class LinkStats:
    """What was dropped, by reason."""

    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count one."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class _Link:
    """What acceptor and dialer share: reading the frames of a known peer."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stats = LinkStats()
        self._transport: Transport | None = None
        self._closed = False

    @property
    def transport(self) -> Transport:
        """The transport below, once there is one."""
        if self._transport is None:
            raise RuntimeError("the link has no transport yet")
        return self._transport

    def attach(self, start: Callable[[Any], Transport]) -> None:
        """Build the transport with this link as its handler."""
        self._transport = start(self)

    def close(self) -> None:
        """Close the transport. Nothing is called back afterwards."""
        self._closed = True
        if self._transport is not None:
            self._transport.close()

    def _read(self, peer: Peer, frame: Frame, buffers: Sequence[Buffer], handler: LinkHandler) -> None:
        session = peer.session
        if frame.session != session.session_id:
            self.stats.drop("frame of another session")
            return
        peer.last_heard = self.loop.time()
        session.on_ack(frame.ack)
        kind = frame.kind
        if kind == wire.DATA:
            self._read_data(peer, frame, buffers, handler)
        elif kind == wire.RESEND:
            session.rewind(max(1, frame.seq))
            peer.flush()
        elif kind == wire.BEAT:
            beat_id, facts = _beat(frame.payload)
            answer = handler.on_beat(peer, beat_id, facts)
            peer.control(wire.ANSWER, [beat_id, answer], seq=session.last_sent)
            self._mend(peer, frame.seq)
        elif kind == wire.ANSWER:
            beat_id, facts = _beat(frame.payload)
            handler.on_answer(peer, beat_id, facts)
            self._mend(peer, frame.seq)
        elif kind == wire.GOODBYE:
            handler.on_goodbye(peer, str(frame.payload))
        if session.has_sendable():
            peer.flush()

    def _read_data(self, peer: Peer, frame: Frame, buffers: Sequence[Buffer], handler: LinkHandler) -> None:
        session = peer.session
        envelopes = parse_envelopes(frame.payload, buffers, self.loop.time())
        fresh = session.on_data(frame.seq, envelopes, wire.inline_bytes(buffers))
        for envelope in fresh:
            handler.on_envelope(peer, envelope)
        missing = session.missing(frame.seq - 1)
        if missing is not None:
            peer.control(wire.RESEND, seq=missing)
        elif session.ack_due():
            peer.control(wire.ACK)

    def _mend(self, peer: Peer, peer_last_sent: int) -> None:
        """A beat tells how far the peer is: ask for what did not come."""
        peer.session.forget_asked()
        missing = peer.session.missing(peer_last_sent)
        if missing is not None:
            peer.control(wire.RESEND, seq=missing)


def _beat(payload: Any) -> tuple[int, dict[str, Any]]:
    if type(payload) is not list or len(payload) != 2 or type(payload[0]) is not int or type(payload[1]) is not dict:
        raise malformed("a beat is not [id, facts]")
    return payload[0], payload[1]


class LinkAcceptor(_Link):
    """The side that others dial: a controller for its agents, an agent for its workers."""

    def __init__(self, handler: AcceptorHandler) -> None:
        super().__init__()
        self._handler = handler
        self._by_session: dict[int, Peer] = {}
        self._by_connection: dict[Connection, Peer] = {}

    @property
    def peers(self) -> list[Peer]:
        """All peers whose sessions live, connected or not."""
        return list(self._by_session.values())

    def end_session(self, peer: Peer) -> None:
        """Forget the peer: whatever it still says is refused."""
        if self._by_session.get(peer.session.session_id) is peer:
            del self._by_session[peer.session.session_id]
        self._detach(peer)

    def on_up(self, connection: Connection) -> None:
        """Transport: acceptors learn of connections by their first message."""

    def on_down(self, connection: Connection) -> None:
        """Transport: the connection is gone."""
        peer = self._by_connection.pop(connection, None)
        if peer is not None and peer.connection == connection:
            peer.connection = None
            self._handler.on_peer_down(peer)

    def on_message(self, connection: Connection, frames: Sequence[Buffer], user_id: str) -> None:
        """Transport: a message. Whatever is wrong with it stays with it."""
        if self._closed:
            return
        try:
            frame = parse_frame(frames[0])
            if frame.kind == wire.HELLO:
                self._hello(connection, frame, user_id)
                return
            peer = self._by_connection.get(connection)
            if peer is None:
                self.stats.drop("frame before HELLO")
                self._tell(connection, wire.RESET, frame.session)
                return
            self._read(peer, frame, frames[1:], self._handler)
        except MalformedFrame as error:
            self.stats.drop(error.evidence)

    def _hello(self, connection: Connection, frame: Frame, user_id: str) -> None:
        hello = frame.payload
        if type(hello) is not dict or type(hello.get("received")) is not int:
            raise malformed("HELLO carries no dict with 'received'")
        peer = self._by_session.get(frame.session)
        resumed = peer is not None
        grant: dict[str, Any] = {}
        if peer is None:
            verdict = self._judge_new(hello, user_id, frame.session)
            if isinstance(verdict, Refusal):
                self._refuse(connection, frame.session, verdict)
                return
            peer = Peer(verdict.name, Session(frame.session), user_id, self)
            self._by_session[frame.session] = peer
            grant = verdict.grant
        elif peer.user_id != user_id:
            self._refuse(connection, frame.session, Refusal("this session belongs to another key"))
            return
        self._attach_connection(peer, connection)
        welcome = {"received": peer.session.received, "resumed": resumed, "grant": grant}
        peer.control(wire.WELCOME, welcome)
        peer.session.resume(hello["received"])
        self._handler.on_peer_up(peer, resumed=resumed)
        peer.flush()

    def _judge_new(self, hello: dict[str, Any], user_id: str, session_id: int) -> Admission | Refusal:
        if hello.get("welcomed"):
            return Refusal("the session is over: this side does not know it any more")
        return self._handler.admit(hello, user_id, session_id)

    def _refuse(self, connection: Connection, session_id: int, refusal: Refusal) -> None:
        self.stats.drop(f"HELLO refused: {refusal.reason}")
        self._tell(connection, wire.REFUSE, session_id, [refusal.reason, refusal.final])

    def _tell(self, connection: Connection, kind: int, session_id: int, payload: Any = None) -> None:
        self.transport.send(connection, [wire.pack_frame(kind, session_id, 0, 0, payload)])

    def _attach_connection(self, peer: Peer, connection: Connection) -> None:
        self._detach(peer)
        other = self._by_connection.get(connection)
        if other is not None and other is not peer:
            other.connection = None
        peer.connection = connection
        peer.last_heard = self.loop.time()
        self._by_connection[connection] = peer

    def _detach(self, peer: Peer) -> None:
        if peer.connection is not None:
            self._by_connection.pop(peer.connection, None)
            peer.connection = None


class LinkDialer(_Link):
    """The side that dials: an agent to its controller, a worker to its agent."""

    def __init__(self, handler: DialerHandler, session_id: int, hello: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._handler = handler
        self._hello = hello
        self.peer = Peer("dialed", Session(session_id), "", self)
        self._welcomed = False
        self._refused = False
        self._greeted_at = -1e9
        self._num_beats = 0

    @property
    def is_welcome(self) -> bool:
        """Whether the acceptor ever accepted this session, and has not refused it since."""
        return self._welcomed and not self._refused

    def beat(self, facts: dict[str, Any]) -> int:
        """Send a beat (or HELLO again, if the acceptor has not answered); returns the beat's id."""
        self._num_beats += 1
        if self._refused:
            return self._num_beats
        if self.peer.connection is None:
            self._greet(min_interval_s=0.9)
        else:
            payload = [self._num_beats, facts]
            self.peer.control(wire.BEAT, payload, seq=self.peer.session.last_sent)
        return self._num_beats

    def on_up(self, connection: Connection) -> None:
        """Transport: connected (again)."""
        self.peer.connection = None
        self._greet()

    def on_down(self, connection: Connection) -> None:
        """Transport: the connection is gone."""
        if self.peer.connection is not None:
            self.peer.connection = None
            self._handler.on_peer_down(self.peer)

    def on_message(self, connection: Connection, frames: Sequence[Buffer], user_id: str) -> None:
        """Transport: a message of the acceptor."""
        if self._closed:
            return
        try:
            frame = parse_frame(frames[0])
            if frame.session != self.peer.session.session_id:
                self.stats.drop("frame of another session")
            elif frame.kind == wire.WELCOME:
                self._on_welcome(frame)
            elif frame.kind == wire.REFUSE:
                self._on_refuse(frame)
            elif frame.kind == wire.RESET:
                self.peer.connection = None
                self._greet(min_interval_s=0.1)
            elif self.peer.connection is not None:
                self._read(self.peer, frame, frames[1:], self._handler)
            else:
                self.stats.drop("frame before WELCOME")
        except MalformedFrame as error:
            self.stats.drop(error.evidence)

    def _greet(self, min_interval_s: float = 0.0) -> None:
        now = self.loop.time()
        if self._refused or now - self._greeted_at < min_interval_s:
            return
        self._greeted_at = now
        hello = {**self._hello(), "received": self.peer.session.received, "welcomed": self._welcomed}
        frame = wire.pack_frame(wire.HELLO, self.peer.session.session_id, 0, 0, hello)
        self.transport.send(DIALED, [frame])

    def _on_welcome(self, frame: Frame) -> None:
        welcome = frame.payload
        if type(welcome) is not dict or type(welcome.get("received")) is not int:
            raise malformed("WELCOME carries no dict with 'received'")
        if self.peer.connection is not None:
            return  # the answer to a HELLO that was sent twice
        self.peer.connection = DIALED
        self.peer.last_heard = self.loop.time()
        self.peer.session.resume(welcome["received"])
        if not self._welcomed:
            self._welcomed = True
            self._handler.on_welcome(dict(welcome.get("grant") or {}))
        self._handler.on_peer_up(self.peer, resumed=bool(welcome.get("resumed")))
        self.peer.flush()

    def _on_refuse(self, frame: Frame) -> None:
        payload = frame.payload
        if type(payload) is not list or len(payload) != 2:
            raise malformed("REFUSE carries no reason")
        refusal = Refusal(str(payload[0]), bool(payload[1]))
        self.peer.connection = None
        if refusal.final or self._welcomed:
            self._refused = True
        self._handler.on_refused(refusal)
