"""What lies below the ZeroMQ transport: sockets that an event loop drains by hand, and word of their connections.

A zmq FD reports edges, not levels, and any other call on the socket may swallow one. Whoever reads a socket here
therefore reads it until it is empty, and looks at it again after every send.
"""

from __future__ import annotations

import asyncio
import select
import struct
from collections.abc import Callable
from typing import Any

import zmq

from miles_agents.timings import Timings
from miles_agents.wire.transport import ZERO_COPY_BYTES, Buffer, TransportHandler, TransportStats
from miles_agents.wire.turns import current_turn
from miles_agents.wire.zmq_auth import ZmqNetwork, ZmqSocket

NOBLOCK = int(zmq.NOBLOCK)
"""As a plain number: zmq's flags are enums, and slow ones."""

MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
"""For every frame of a message but the last."""

FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
"""The events that tell of a handshake that came to nothing."""

_SWEEP_S = 1.0
_POLLIN = int(zmq.POLLIN)
_MESSAGES_PER_TURN = 256
_CURVE_OVERHEAD_BYTES = 256
_MONITOR_MESSAGE = struct.Struct("=HI")
_PROTOCOL_REASONS = {
    int(zmq.Event.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): "a key does not fit",
    int(zmq.Event.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "one side does not encrypt",
}


class Pump:
    """Reads one socket on the event loop until it is empty, whatever its FD did or did not report.

    ``read`` takes one message off the socket and handles it; False if there was none. ``on_empty`` runs each time
    that the socket was found empty.
    """

    def __init__(self, socket: ZmqSocket, read: Callable[[], bool], on_empty: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._read = read
        self._on_empty = on_empty
        self._scheduled = False
        self._draining = False
        self._was_read = False
        self._closed = False
        self._fd = socket.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._loop.add_reader(self._fd, self.drain)
        self.kick()

    def kick(self) -> None:
        """Look at the socket again soon. Any send may have swallowed the edge of a message that came."""
        if not self._scheduled and not self._draining:
            self._scheduled = True
            self._loop.call_soon(self._look)

    def drain(self) -> None:
        """Read until the socket is empty, but not for more than a turn's worth."""
        if self._draining or self._closed:
            return
        self._draining = self._was_read = True
        is_empty = False
        turn = current_turn()
        is_ours = turn.begin()
        turn.more = True  # whether it is so is not known before the next read
        try:
            for _ in range(_MESSAGES_PER_TURN):
                if not self._read():
                    is_empty = True
                    break
        finally:
            if is_ours:
                turn.end()
            # Also when a handler raised: what is left must not wait for an edge that has already passed.
            self._draining = False
            if not is_empty:
                self.kick()
        if is_empty:
            self._on_empty()

    def has_input(self) -> bool:
        """Whether a message waits. Also makes the socket take notice of what its I/O thread has told it."""
        return bool(events(self._socket) & _POLLIN)

    def missed_edge(self) -> bool:
        """Whether a message waits although the FD is silent and nobody is about to look; if so, look.

        A socket that was read since the last call is left alone: it is awake, and the answer would be a guess,
        because messages come in between.
        """
        was_read, self._was_read = self._was_read, False
        if was_read or self._scheduled or self._poll.poll(0) or not self.has_input():
            return False
        self.kick()
        return True

    def close(self) -> None:
        """Stop reading; the socket itself stays its owner's."""
        self._closed = True
        self._loop.remove_reader(self._fd)

    def _look(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        if self.has_input():
            self.drain()
        else:
            self._on_empty()


class Monitor:
    """Reports the life of a socket's connections: ``on_event(event, value)``, in the order of the I/O thread.

    Args:
        context: The context of ``watched``.
        endpoint: A fresh inproc address in it.
        watched: The socket to watch.
        kinds: Which zmq events to report.
        on_event: Receives them, on the event loop.
    """

    def __init__(
        self,
        context: zmq.Context[ZmqSocket],
        endpoint: str,
        watched: ZmqSocket,
        kinds: int,
        on_event: Callable[[int, int], None],
    ) -> None:
        self._watched = watched
        self._on_event = on_event
        watched.monitor(endpoint, kinds)
        self._socket = context.socket(zmq.PAIR)
        # Set before connect: at a high-water mark the I/O thread would block on us, and with it all traffic.
        self._socket.rcvhwm = 0
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self.pump = Pump(self._socket, self._read, lambda: None)

    def close(self) -> None:
        """Stop reporting."""
        self.pump.close()
        self._watched.disable_monitor()
        self._socket.close(linger=0)

    def _read(self) -> bool:
        if self._socket.closed:
            return False
        try:
            head = self._socket.recv_multipart(NOBLOCK)[0]
        except zmq.Again:
            return False
        event, value = _MONITOR_MESSAGE.unpack(head)
        self._on_event(event, value)
        return True


class SocketTransport:
    """What acceptor and dialer share: socket options, sending, draining, closing. Parameters: see ``ZmqAcceptor``."""

    def __init__(
        self,
        socket_type: int,
        address: str,
        handler: TransportHandler,
        *,
        network: ZmqNetwork | None,
        max_frame_bytes: int,
        timings: Timings,
        handshake_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._address = address
        self._stats = TransportStats()
        self._max_frame_bytes = max_frame_bytes
        self._closed = False
        self._owns_network = network is None
        self._network = network or ZmqNetwork()
        self._network.enter(self)
        self._socket = self._network.context.socket(socket_type)
        self._recv: Callable[..., Any] = self._socket.recv
        set_options(self._socket, address, max_frame_bytes, timings, handshake_s)
        self._pump = Pump(self._socket, self._read_message, self._on_empty)
        self._monitor: Monitor | None = None
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    @property
    def address(self) -> str:
        """What was bound, with the port that the system chose, or what was dialed."""
        return self._address

    @property
    def stats(self) -> TransportStats:
        """Live counters. ``reasons`` counts refusals by reason, and missed edges (expected: none)."""
        return self._stats

    def close(self) -> None:
        """Close now; what was not sent yet is lost. Nothing is called back afterwards. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._sweeper.cancel()
        self._pump.close()
        if self._monitor is not None:
            self._monitor.close()
        self._on_close()
        self._socket.close(linger=0)
        self._network.leave(self)
        if self._owns_network:
            self._network.close()

    def _watch(self, events: int) -> None:
        self._monitor = Monitor(
            self._network.context,
            self._network.new_endpoint(),
            self._socket,
            events | FAILURES | zmq.EVENT_DISCONNECTED,
            self._on_event,
        )

    def _put(self, frames: list[bytes | memoryview]) -> None:
        """Queue the frames of one message. Raises zmq.Again or EHOSTUNREACH only at the first."""
        send = self._socket.send
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            flags = NOBLOCK if index == last else MORE
            if len(frame) < ZERO_COPY_BYTES:
                send(frame, flags)
            else:
                send(frame, flags, copy=False)

    def _sent(self, size: int) -> bool:
        self._stats.sent_messages += 1
        self._stats.sent_bytes += size
        self._pump.kick()
        return True

    def _unsent(self) -> bool:
        self._stats.unsendable += 1
        self._pump.kick()
        return False

    def _rest_of_message(self, frame: zmq.Frame) -> list[Buffer]:
        """Receive what follows ``frame`` (zmq delivers messages whole, so it is there)."""
        stats = self._stats
        stats.received_messages += 1
        frames: list[Buffer] = []
        while True:
            size = len(frame)
            stats.received_bytes += size
            frames.append(frame.bytes if size < ZERO_COPY_BYTES else frame.buffer)
            if not frame.more:
                return frames
            frame = self._recv(NOBLOCK, False)

    def _refuse(self, reason: str) -> None:
        self._stats.refused += 1
        self._count(reason)

    def _count(self, reason: str) -> None:
        self._stats.reasons[reason] = self._stats.reasons.get(reason, 0) + 1

    def _sweep(self) -> None:
        pumps = [self._pump] if self._monitor is None else [self._pump, self._monitor.pump]
        for pump in pumps:
            if pump.missed_edge():
                self._count("missed edge")
        self._on_empty()
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    def _on_close(self) -> None:
        raise NotImplementedError

    def _read_message(self) -> bool:
        raise NotImplementedError

    def _on_empty(self) -> None:
        raise NotImplementedError

    def _on_event(self, event: int, value: int) -> None:
        raise NotImplementedError


def set_options(socket: ZmqSocket, address: str, max_frame_bytes: int, timings: Timings, handshake_s: float) -> None:
    """What acceptors and dialers have in common. Before bind and connect, or zmq ignores it."""
    socket.linger = 0
    socket.sndhwm = 0
    socket.rcvhwm = 0
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes + _CURVE_OVERHEAD_BYTES)
    socket.heartbeat_ivl = round(timings.beat_s * 1000)
    socket.heartbeat_timeout = round(timings.suspect_s * 1000)
    socket.handshake_ivl = round(handshake_s * 1000)
    socket.ipv6 = 1 if "[" in address else 0


def events(socket: ZmqSocket) -> int:
    """The socket's ``EVENTS``; asking makes it take notice of what its I/O thread has told it."""
    flags = socket.getsockopt(zmq.EVENTS)
    return flags if isinstance(flags, int) else 0


def message_property(frame: zmq.Frame, name: str) -> str:
    """A property of the connection by which a message came, ``""`` if it has none of this name."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def failure(event: int, value: int) -> str:
    """A failed handshake in words; one of a small set, so that it can be counted."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the key is not allowed"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return _PROTOCOL_REASONS.get(value, "not our protocol")
    return "the handshake did not end"
