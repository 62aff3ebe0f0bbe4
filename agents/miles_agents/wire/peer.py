"""The other end of a session, as the code above a link sees it: what is sent to it, and when that leaves.

Consumes: envelopes to send, from any thread where the transport allows that. Produces: messages for the transport.
Waits for: nothing; what the window or a missing connection holds back leaves with the next flush. Invariants: the
lock guards the session's numbers, and nothing is called back while it is held; what was accepted is flushed by the
turn or the tick that it was sent in.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import Envelope
from miles_agents.wire.session import Session
from miles_agents.wire.short_frame import Packed
from miles_agents.wire.transport import Connection
from miles_agents.wire.turns import current_turn

if TYPE_CHECKING:
    from miles_agents.wire.link import Link

_BURST_S = 150e-6
"""Messages closer to each other than this are a burst: waiting for the tick's end costs less than a write for each."""


class Peer:
    """The other end of one session.

    ``send`` may be called from any thread where the transport below allows that; everything else belongs to the loop.
    The lock guards the session's numbers; nothing is called back while it is held.
    """

    def __init__(
        self, name: str, session: Session, user_id: str, link: Link, grant: dict[str, Any] | None = None
    ) -> None:
        self.name = name
        self.session = session
        self.user_id = user_id
        self.grant = grant or {}
        self.connection: Connection | None = None
        self.is_over = False
        self.last_heard = asyncio.get_running_loop().time()
        self.lock = threading.RLock()
        self._link = link
        self._thread = threading.get_ident()
        self._flush_is_due = False
        self._tick_is_open = False
        self._last_sent = -1.0
        # An event loop's own clock may be as coarse as a millisecond; a virtual one is the only one that counts there.
        self._clock: Callable[[], float] = getattr(link.loop, "precise_time", perf_counter)

    @property
    def is_up(self) -> bool:
        """Whether there is a connection to it now, as far as is known."""
        return self.connection is not None

    def send(self, envelope: Envelope | Packed) -> None:
        """Send in order, exactly once, now or as soon as window and connection allow.

        A message on its own leaves at once, those of a burst together at the end of the loop's tick; where it is known
        that more will be read in this turn, they all leave together at its end.

        Raises:
            UnsendableMessage: no peer would take it; nothing was sent.
        """
        if threading.get_ident() != self._thread:
            with self.lock:
                self._send_now(envelope)
            return
        if self._flush_is_due or self._tick_is_open:
            with self.lock:
                self.session.send(envelope)
            self._flush_is_due = True  # the end of the tick, or of the turn, is under way
            return
        turn = current_turn()
        if turn.more:
            with self.lock:
                self.session.send(envelope)
            self._flush_is_due = True
            turn.at_end(self.flush)
            return
        now = self._clock()
        if now - self._last_sent < _BURST_S:
            self._tick_is_open = True
            self._link.loop.call_soon(self._end_tick)
        self._last_sent = now
        with self.lock:
            self._send_now(envelope)

    def _send_now(self, envelope: Envelope | Packed) -> None:
        connection, link = self.connection, self._link
        if connection is None:
            self.session.send(envelope)
            return
        batch = self.session.send_at_once(envelope, link.loop.time())
        if batch is None:
            self._put()
            return
        self._transmit(connection, batch)

    def _transmit(self, connection: Connection, batch: wire.Batch) -> bool:
        """Hand a batch to the transport; what it does not take has to be sent again."""
        sent = False
        try:
            sent = self._link.transport.send(connection, batch.frames)
        except Exception as error:  # noqa: BLE001 - boundary: a transport must not take down the process's I/O
            self._link.boundary("sending").caught(error)
        if not sent:
            self.session.rewind(batch.first_seq)
        return sent

    def _end_tick(self) -> None:
        self._tick_is_open = False
        if self._flush_is_due:
            self.flush()

    def flush(self) -> None:
        """Put on the wire what may go now."""
        self._flush_is_due = False
        with self.lock:
            self._put()

    def _put(self) -> None:
        now = self._link.loop.time()
        while (connection := self.connection) is not None:
            batch = self.session.next_batch(now)
            if batch is None or not self._transmit(connection, batch):
                break
        if self.session.ack_due():
            self.control(wire.ACK)

    def acknowledge(self) -> None:
        """Acknowledge on its own what no frame of this side has acknowledged in passing for too long."""
        with self.lock:
            if self.session.ack_due():
                self.control(wire.ACK)

    def control(self, kind: int, payload: Any = None, *, seq: int | None = 0) -> None:
        """Send a frame without envelopes, if there is a connection; lost otherwise. ``seq`` None: the last sent."""
        with self.lock:
            if self.connection is not None:
                number = self.session.last_sent if seq is None else seq
                self._link.transport.send(self.connection, self.session.control(kind, payload, seq=number))

    def say_goodbye(self, reason: str) -> None:
        """Tell the peer that this end leaves in good order."""
        self.flush()
        self.control(wire.GOODBYE, reason)
