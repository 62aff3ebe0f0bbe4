"""Links: sessions on a transport. Who is there, what was said, and how long ago.

Consumes: messages of a transport, envelopes of the node above. Produces: the peers' envelopes in order, each once;
word of peers that come (``on_peer_up``), fall silent on the wire (``on_peer_down``, a hint) or say goodbye.
Waits for: nothing; beats are sent from outside (``LinkDialer.beat``), silence is judged above (leases, membership).

A dialer says HELLO on every new connection. The acceptor asks its ``admit`` what to do: a session it knows is
resumed, a new one begins, anything else is refused with a reason. A connection that speaks before its HELLO is told
so (RESET). Invariants: one connection per peer, the newest; the key that opened a session is the only one that can
resume it; a frame that breaks the protocol is counted and dropped, and disturbs nobody else; neither does an exception
of a handler: it is counted and logged, and costs the one message that was handed over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import is_natural, malformed
from miles_agents.wire.fragments import Item
from miles_agents.wire.link_handlers import (
    AcceptorHandler,
    Admission,
    Boundary,
    DialerHandler,
    LinkHandler,
    LinkStats,
    Refusal,
)
from miles_agents.wire.peer import Peer
from miles_agents.wire.session import LOCAL, Frame, Pace, Session, parse_frame, parse_items
from miles_agents.wire.short_frame import (
    ACK,
    SEQ,
    SESSION,
    SHORT,
    Arrived,
    Numbers,
    envelope_of,
    read_numbers,
    short_of,
)
from miles_agents.wire.transport import DIALED, Buffer, Connection, Transport, TransportStats
from miles_agents.wire.turns import current_turn


class _NoTransport:
    """What a link has before it is attached."""

    address = ""
    stats = TransportStats()

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Nobody is there."""
        return False

    def close(self) -> None:
        """Nothing is open."""


class Link:
    """What acceptor and dialer share: reading the frames of a known peer."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stats = LinkStats()
        self.transport: Transport = _NoTransport()
        """The transport below, once there is one."""
        self.relay: Callable[[Peer, Numbers, bytes], bool] | None = None
        """A hop's short way for short frames: True if it has passed the envelope on; it may decline any."""
        self._closed = False

    def attach(self, start: Callable[[Any], Transport]) -> None:
        """Build the transport with this link as its handler."""
        self.transport = start(self)

    def close(self) -> None:
        """Close the transport. Nothing is called back afterwards."""
        self._closed = True
        self.transport.close()

    def on_message(self, connection: Connection, frames: Sequence[Buffer], user_id: str) -> None:
        """Transport: a message. Whatever is wrong with it stays with it."""
        if self._closed:
            return
        try:
            data = frames[0] if len(frames) == 1 else b""
            if type(data) is bytes and data[:1] == SHORT:
                self._on_short(connection, data)
            elif frames:
                self._on_frame(connection, parse_frame(frames[0]), frames, user_id)
            else:
                raise malformed("a message without frames")
        except Exception as error:  # noqa: BLE001 - boundary: one message must not take down the process's I/O
            self.boundary("reading a message").caught(error)

    def _on_short(self, connection: Connection, data: bytes) -> None:
        """One envelope; the same as a DATA frame with it, in fewer steps."""
        numbers = read_numbers(data, wire.VERSION)
        peer, handler = self._speaker(connection, numbers[SESSION])
        if peer is None:
            return
        now = peer.last_heard = self.loop.time()
        session = peer.session
        seq, ack = numbers[SEQ], numbers[ACK]
        with peer.lock:
            is_next = session.take_next(seq, ack, len(data))
        if not is_next:
            frame = Frame(wire.DATA, session.session_id, seq, ack, None)
            self._take_items(peer, frame, [Arrived(numbers, short_of(data))], len(data), handler)
            return
        short = short_of(data)
        try:
            if self.relay is None or not self.relay(peer, numbers, short):
                handler.on_envelope(peer, envelope_of(numbers, short, now))
        except Exception as error:  # noqa: BLE001 - boundary: the code above
            self.boundary("on_envelope").caught(error)
        if session.ack_due():
            peer.acknowledge()

    def _speaker(self, connection: Connection, session: int) -> tuple[Peer | None, LinkHandler]:
        """Who may say something in this session on this connection now. None: nobody, and it is dealt with."""
        raise NotImplementedError

    def _on_frame(self, connection: Connection, frame: Frame, frames: Sequence[Buffer], user_id: str) -> None:
        raise NotImplementedError

    def boundary(self, what: str) -> Boundary:
        """A context out of which no exception gets: one message must not take down the process's I/O."""
        return Boundary(self.stats, what)

    def _read(self, peer: Peer, frame: Frame, frames: Sequence[Buffer], handler: LinkHandler) -> None:
        session = peer.session
        if frame.session != session.session_id:
            self.stats.drop("frame of another session")
            return
        now = peer.last_heard = self.loop.time()
        kind = frame.kind
        if kind == wire.DATA:
            self._read_data(peer, frame, frames, handler, now)
            return
        with peer.lock:
            session.on_ack(frame.ack)
        if kind == wire.ACK:
            pass
        elif kind == wire.RESEND:
            with peer.lock:
                session.on_resend(frame.seq)
        elif kind == wire.BEAT:
            beat_id, facts = _beat(frame.payload)
            with self.boundary("on_beat"):
                answer = handler.on_beat(peer, beat_id, facts)
                peer.control(wire.ANSWER, [beat_id, answer], seq=None)
            self._mend(peer, frame.seq)
        elif kind == wire.ANSWER:
            beat_id, facts = _beat(frame.payload)
            with self.boundary("on_answer"):
                handler.on_answer(peer, beat_id, facts)
            self._mend(peer, frame.seq)
        elif kind == wire.GOODBYE:
            if type(frame.payload) is not str:
                raise malformed("GOODBYE carries no text")
            with self.boundary("on_goodbye"):
                handler.on_goodbye(peer, frame.payload)
        else:
            self.stats.drop("frame of a kind that this side does not expect")
        if session.waiting:
            peer.flush()

    def _read_data(self, peer: Peer, frame: Frame, frames: Sequence[Buffer], handler: LinkHandler, now: float) -> None:
        items = parse_items(frame.payload, frames[1:] if len(frames) > 1 else (), now)
        self._take_items(peer, frame, items, wire.total_bytes(frames), handler)

    def _take_items(self, peer: Peer, frame: Frame, items: list[Item], num_bytes: int, handler: LinkHandler) -> None:
        session, seq = peer.session, frame.seq
        with peer.lock:
            session.on_ack(frame.ack)
            fresh = session.on_data(seq, items, num_bytes)
        turn = current_turn()
        is_ours, more = turn.begin(), turn.more
        last = len(fresh) - 1
        try:
            for index, item in enumerate(fresh):
                if self._closed or peer.is_over:
                    break  # an envelope before it ended the session
                turn.more = more or index < last
                try:
                    if not isinstance(item, Arrived):
                        handler.on_envelope(peer, item)
                    elif self.relay is None or not self.relay(peer, item.numbers, item.short):
                        handler.on_envelope(peer, envelope_of(item.numbers, item.short, peer.last_heard))
                except Exception as error:  # noqa: BLE001 - boundary: the code above; the envelopes behind this one are others'
                    self.boundary("on_envelope").caught(error)
        finally:
            turn.more = more
            if is_ours:
                turn.end()
        if seq > session.received:
            missing = session.missing(seq - 1)
            if missing is not None:
                peer.control(wire.RESEND, seq=missing)
        elif session.ack_due():
            peer.acknowledge()
        if session.waiting:
            peer.flush()

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


class LinkAcceptor(Link):
    """The side that others dial: a controller for its agents, an agent for its workers."""

    def __init__(self, handler: AcceptorHandler, pace: Pace = LOCAL) -> None:
        super().__init__()
        self._handler = handler
        self._pace = pace
        self._by_session: dict[int, Peer] = {}
        self._by_connection: dict[Connection, Peer] = {}

    @property
    def peers(self) -> list[Peer]:
        """All peers whose sessions live, connected or not."""
        return list(self._by_session.values())

    def end_session(self, peer: Peer) -> None:
        """Forget the peer: whatever it still says is refused."""
        peer.is_over = True
        if self._by_session.get(peer.session.session_id) is peer:
            del self._by_session[peer.session.session_id]
        self._detach(peer)

    def on_up(self, connection: Connection) -> None:
        """Transport: acceptors learn of connections by their first message."""

    def on_down(self, connection: Connection) -> None:
        """Transport: the connection is gone."""
        peer = self._by_connection.pop(connection, None)
        if peer is not None and peer.connection == connection:
            self._down(peer)

    def _on_frame(self, connection: Connection, frame: Frame, frames: Sequence[Buffer], user_id: str) -> None:
        if frame.kind == wire.HELLO:
            self._on_hello(connection, frame, user_id)
            return
        peer = self._by_connection.get(connection)
        if peer is None:
            self.stats.drop("frame before HELLO")
            self._tell(connection, wire.RESET, frame.session)
        else:
            self._read(peer, frame, frames, self._handler)

    def _speaker(self, connection: Connection, session: int) -> tuple[Peer | None, LinkHandler]:
        peer = self._by_connection.get(connection)
        if peer is None:
            self.stats.drop("frame before HELLO")
            self._tell(connection, wire.RESET, session)
        elif peer.session.session_id != session:
            self.stats.drop("frame of another session")
            peer = None
        return peer, self._handler

    def _on_hello(self, connection: Connection, frame: Frame, user_id: str) -> None:
        hello = frame.payload
        if type(hello) is not dict or not is_natural(hello.get("received")):
            raise malformed("HELLO carries no dict with 'received'")
        peer = self._by_session.get(frame.session)
        resumed = peer is not None
        if peer is None:
            verdict = self._judge_new(hello, user_id, frame.session)
            if isinstance(verdict, Refusal):
                self._refuse(connection, frame.session, verdict)
                return
            peer = Peer(verdict.name, Session(frame.session, self._pace), user_id, self, verdict.grant)
            self._by_session[frame.session] = peer
        elif peer.user_id != user_id:
            self._refuse(connection, frame.session, Refusal("this session belongs to another key"))
            return
        else:
            peer.session.resume(hello["received"])
        self._attach_connection(peer, connection)
        # The grant goes out every time: the WELCOME that carried it before may have been lost.
        peer.control(wire.WELCOME, {"received": peer.session.received, "grant": peer.grant})
        with self.boundary("on_peer_up"):
            self._handler.on_peer_up(peer, resumed=resumed)
        peer.flush()

    def _judge_new(self, hello: dict[str, Any], user_id: str, session_id: int) -> Admission | Refusal:
        if hello.get("welcomed"):
            return Refusal("the session is over: this side does not know it any more")
        if hello["received"]:
            raise malformed("a new session has received something before")
        with self.boundary("admit"):
            return self._handler.admit(hello, user_id, session_id)
        return Refusal("this side failed to judge the HELLO; its log says why", final=False)

    def _refuse(self, connection: Connection, session_id: int, refusal: Refusal) -> None:
        self.stats.drop(f"HELLO refused: {refusal.reason}")
        self._tell(connection, wire.REFUSE, session_id, [refusal.reason, refusal.final])

    def _tell(self, connection: Connection, kind: int, session_id: int, payload: Any = None) -> None:
        self.transport.send(connection, [wire.pack_frame(kind, session_id, 0, 0, payload)])

    def _attach_connection(self, peer: Peer, connection: Connection) -> None:
        self._detach(peer)
        other = self._by_connection.get(connection)
        peer.connection = connection
        peer.last_heard = self.loop.time()
        self._by_connection[connection] = peer
        if other is not None:
            self._down(other)

    def _down(self, peer: Peer) -> None:
        peer.connection = None
        with self.boundary("on_peer_down"):
            self._handler.on_peer_down(peer)

    def _detach(self, peer: Peer) -> None:
        if peer.connection is not None:
            self._by_connection.pop(peer.connection, None)
            peer.connection = None


class LinkDialer(Link):
    """The side that dials: an agent to its controller, a worker to its agent."""

    def __init__(
        self, handler: DialerHandler, session_id: int, hello: Callable[[], dict[str, Any]], pace: Pace = LOCAL
    ) -> None:
        super().__init__()
        self._handler = handler
        self._hello = hello
        self._pace = pace
        self.peer = Peer("dialed", Session(session_id, pace), "", self)
        self._welcomed = False
        self._refused = False
        self._greeted_at = -1e9
        self._has_greeted = False
        self._num_beats = 0

    @property
    def is_welcome(self) -> bool:
        """Whether the acceptor ever accepted this session, and has not refused it since."""
        return self._welcomed and not self._refused

    @property
    def has_greeted(self) -> bool:
        """Whether a HELLO was sent that the acceptor may have accepted, or may still accept."""
        return self._has_greeted and not self._refused

    def beat(self, facts: dict[str, Any]) -> int:
        """Send a beat (or HELLO again, if the acceptor has not answered); returns the beat's id."""
        self._num_beats += 1
        if self._refused:
            return self._num_beats
        if self.peer.connection is None:
            self._greet(min_interval_s=0.9)
        else:
            payload = [self._num_beats, facts]
            self.peer.control(wire.BEAT, payload, seq=None)
        return self._num_beats

    def renew_session(self, session_id: int) -> None:
        """Say the next HELLO as somebody new. Only after a refusal, and before the first WELCOME: nothing is lost."""
        assert not self._welcomed
        self.peer.session = Session(session_id, self._pace)

    def on_up(self, connection: Connection) -> None:
        """Transport: connected (again)."""
        self.peer.connection = None
        self._greet()

    def on_down(self, connection: Connection) -> None:
        """Transport: the connection is gone."""
        if self.peer.connection is not None:
            self.peer.connection = None
            with self.boundary("on_peer_down"):
                self._handler.on_peer_down(self.peer)

    def _on_frame(self, connection: Connection, frame: Frame, frames: Sequence[Buffer], user_id: str) -> None:
        if frame.session != self.peer.session.session_id:
            self.stats.drop("frame of another session")
        elif self._refused:
            self.stats.drop("frame after REFUSE")
        elif frame.kind == wire.WELCOME:
            self._on_welcome(frame)
        elif frame.kind == wire.REFUSE:
            self._on_refuse(frame)
        elif frame.kind == wire.RESET:
            self.peer.connection = None
            self._greet(min_interval_s=0.1)
        elif self.peer.connection is not None:
            self._read(self.peer, frame, frames, self._handler)
        else:
            self.stats.drop("frame before WELCOME")

    def _speaker(self, connection: Connection, session: int) -> tuple[Peer | None, LinkHandler]:
        peer = self.peer
        if session != peer.session.session_id:
            self.stats.drop("frame of another session")
        elif self._refused:
            self.stats.drop("frame after REFUSE")
        elif peer.connection is None:
            self.stats.drop("frame before WELCOME")
        else:
            return peer, self._handler
        return None, self._handler

    def _greet(self, min_interval_s: float = 0.0) -> None:
        now = self.loop.time()
        if self._refused or now - self._greeted_at < min_interval_s:
            return
        self._greeted_at = now
        with self.boundary("saying HELLO"):
            hello = {**self._hello(), "received": self.peer.session.received, "welcomed": self._welcomed}
            frame = wire.pack_frame(wire.HELLO, self.peer.session.session_id, 0, 0, hello)
            self._has_greeted |= self.transport.send(DIALED, [frame])

    def _on_welcome(self, frame: Frame) -> None:
        welcome = frame.payload
        if (
            type(welcome) is not dict
            or not is_natural(welcome.get("received"))
            or type(welcome.get("grant")) is not dict
        ):
            raise malformed("WELCOME carries no dict with 'received' and 'grant'")
        if self.peer.connection is not None:
            return  # the answer to a HELLO that was sent twice
        with self.peer.lock:
            self.peer.session.resume(welcome["received"])
            self.peer.connection = DIALED
        self.peer.last_heard = self.loop.time()
        resumed = self._welcomed
        if not resumed:
            self._welcomed = True
            with self.boundary("on_welcome"):
                self._handler.on_welcome(welcome["grant"])
        with self.boundary("on_peer_up"):
            self._handler.on_peer_up(self.peer, resumed=resumed)
        self.peer.flush()

    def _on_refuse(self, frame: Frame) -> None:
        payload = frame.payload
        if type(payload) is not list or len(payload) != 2 or type(payload[0]) is not str:
            raise malformed("REFUSE carries no reason")
        refusal = Refusal(payload[0], bool(payload[1]))
        self.peer.connection = None
        if refusal.final or self._welcomed:
            self._refused = True
        with self.boundary("on_refused"):
            self._handler.on_refused(refusal)
