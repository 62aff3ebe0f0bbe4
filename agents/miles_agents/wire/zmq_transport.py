"""The transport on ZeroMQ: ROUTER accepts, DEALER dials, over tcp with CURVE.

Consumes: messages to send; what the sockets and their monitors report. Produces: the callbacks of
``TransportHandler``. Waits for: nothing; the event loop watches the sockets' FDs and drains them by hand
(twice as fast as ``zmq.asyncio``).

Invariants:
    * A zmq FD reports edges, and any other call on the socket may swallow one. So a socket is always read until it
      is empty, and looked at again after every send; a sweep each second counts edges that were missed all the same.
    * One I/O thread per context: what a monitor reported before a message is visible when that message is.
    * High-water marks are off (zmq drops silently at them); the windows of the sessions bound what is queued.
    * The name of a connection is made by the acceptor's socket; a peer that brings a name of its own is refused.
    * The allow list is asked for every message, because an open connection outlives the revocation of its key.

Frames from ``ZERO_COPY_BYTES`` up are not copied in either direction; received ones are writable.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import zmq

from miles_agents.timings import Timings
from miles_agents.wire.addresses import AddressUnavailable, BadAddress
from miles_agents.wire.frames import flat_frames
from miles_agents.wire.keys import AllowList, ClientKeys, KeyPair
from miles_agents.wire.transport import (
    DIALED,
    MAX_FRAME_BYTES,
    Buffer,
    Connection,
    TransportHandler,
)
from miles_agents.wire.zmq_auth import ZmqNetwork, check_acceptor_address, check_dialer_address
from miles_agents.wire.zmq_socket import MORE, NOBLOCK, SocketTransport, failure, message_property

_REDIAL_S = (0.1, 5.0)
_CONNECT_TIMEOUT_MS = 5000

__all__ = ["ZmqAcceptor", "ZmqDialer", "ZmqNetwork"]


@dataclass(slots=True)
class _Peer:
    """What is known of one connection of an acceptor."""

    user_id: str
    fd: int


class ZmqAcceptor(SocketTransport):
    """The listening side: one ROUTER, many connections. Each is known from its first message on.

    Args:
        address: ``tcp://host:port`` (port 0 or ``*``: any free one).
        handler: Receives the callbacks, on this event loop.
        curve: This side's key pair; there is no listening without.
        allow: The keys that may connect; needed as well. Changes take effect at once.
        network: Context to share; without one the acceptor has its own.
        any_interface: Allow an address that means every interface.
        max_frame_bytes: A larger frame costs the peer its connection.
        timings: A silent connection is dropped after ``suspect_s``, asked for life each ``beat_s``.
        handshake_s: A peer that has not proved its key by then is dropped.

    Raises:
        InsecureAddress, BadAddress: the address is not safe to listen on.
        AddressUnavailable: the system refuses the address.
    """

    def __init__(
        self,
        address: str,
        handler: TransportHandler,
        *,
        curve: KeyPair | None = None,
        allow: AllowList | None = None,
        network: ZmqNetwork | None = None,
        any_interface: bool = False,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        timings: Timings | None = None,
        handshake_s: float = 10.0,
    ) -> None:
        check_acceptor_address(address, curve=curve, allow=allow, any_interface=any_interface)
        super().__init__(
            zmq.ROUTER,
            address,
            handler,
            network=network,
            max_frame_bytes=max_frame_bytes,
            timings=timings or Timings(),
            handshake_s=handshake_s,
        )
        self._allow = allow if curve is not None else None
        self._peers: dict[Connection, _Peer] = {}
        self._by_fd: dict[int, list[Connection]] = {}
        self._ended: dict[Connection, None] = {}
        self._num_silent = 0
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if curve is not None and allow is not None:
            self._socket.curve_server = 1
            self._socket.curve_secretkey = curve.secret.encode("ascii")
            self._socket.zap_domain = self._network.zap.admit(allow).encode("ascii")
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._watch(zmq.EVENT_ACCEPTED)
        self._bind(address)

    @property
    def network(self) -> ZmqNetwork:
        """The context and key check that this acceptor runs on."""
        return self._network

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Queue one message; see ``Transport.send``.

        Raises:
            UnsendableMessage: the message can be sent to nobody.
        """
        flat, size = flat_frames(frames, self._max_frame_bytes)
        if self._closed:
            return False
        try:
            self._socket.send(connection, MORE)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            if connection in self._peers:
                self._end(connection)
            return self._unsent()
        self._put(flat)
        return self._sent(size)

    def _bind(self, address: str) -> None:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressUnavailable(
                f"cannot listen on {address}",
                evidence=f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}",
                advice="Choose a free port on an address of this machine, or let the system choose (port 0).",
            ) from error
        self._address = self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def _read_message(self) -> bool:
        if self._closed:
            return False
        try:
            connection: Connection = self._recv(NOBLOCK)
        except zmq.Again:
            return False
        first: zmq.Frame = self._recv(NOBLOCK, False)
        peer = self._peers.get(connection) or self._meet(connection, first)
        frames = self._rest_of_message(first)
        # Names given by the socket are a zero byte and a counter; any other was brought along by the peer.
        if len(connection) != 5 or connection[0]:
            self._refuse("a connection that names itself")
        elif self._allow is not None and peer.user_id not in self._allow:
            self._refuse("a message under a key that is not allowed (any more)")
        else:
            self._handler.on_message(connection, frames, peer.user_id)
        return True

    def _meet(self, connection: Connection, frame: zmq.Frame) -> _Peer:
        """The first message of a connection: bind its name to its key and to its fd, whose end will be reported."""
        if self._monitor is not None:
            self._monitor.pump.drain()
        peer = _Peer(message_property(frame, "User-Id") if self._allow is not None else "", frame.get(zmq.SRCFD))
        siblings = self._by_fd.get(peer.fd)
        if siblings is None:
            if connection not in self._ended:
                self._num_silent -= 1
            self._end(connection)
        else:
            # An fd is reused only after its end was reported. If in doubt (a predecessor on this fd left messages
            # behind) the connection counts to the living one: its end is then told late, never too early.
            siblings.append(connection)
            self._peers[connection] = peer
        return peer

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._end_fd(value)
            self._by_fd[value] = []
        elif event == zmq.EVENT_DISCONNECTED:
            self._end_fd(value)
        else:
            self._num_silent -= 1  # the end of this connection comes next, and counts it once more
            self._refuse(failure(event, value))

    def _end_fd(self, fd: int) -> None:
        connections = self._by_fd.pop(fd, None)
        if connections is None:
            return
        for connection in connections:
            self._end(connection)
        if not connections:
            # Nothing was heard of it so far. Perhaps its messages have not been read yet: judged when they are.
            self._num_silent += 1
            self._pump.kick()

    def _end(self, connection: Connection) -> None:
        """Report the end once the socket is empty, so that it comes after the connection's last message."""
        self._ended[connection] = None
        self._pump.kick()

    def _on_empty(self) -> None:
        for _ in range(self._num_silent):
            self._refuse("the connection ended before its first message")
        self._num_silent = 0
        while self._ended and not self._closed:
            connection = next(iter(self._ended))
            del self._ended[connection]
            peer = self._peers.pop(connection, None)
            siblings = self._by_fd.get(peer.fd, []) if peer is not None else []
            if connection in siblings:
                siblings.remove(connection)
            self._handler.on_down(connection)


class ZmqDialer(SocketTransport):
    """The calling side: one DEALER, one connection (``DIALED``) that is made again whenever it breaks.

    Args:
        address: What the acceptor's ``address`` says.
        handler: Receives the callbacks, on this event loop.
        curve: The server's public key and our own pair; there is no dialing without.
        network, max_frame_bytes, timings, handshake_s: As for ``ZmqAcceptor``.

    Raises:
        InsecureAddress, BadAddress: no keys, or not an address.
    """

    def __init__(
        self,
        address: str,
        handler: TransportHandler,
        *,
        curve: ClientKeys | None = None,
        network: ZmqNetwork | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        timings: Timings | None = None,
        handshake_s: float = 10.0,
    ) -> None:
        check_dialer_address(address, encrypted=curve is not None)
        super().__init__(
            zmq.DEALER,
            address,
            handler,
            network=network,
            max_frame_bytes=max_frame_bytes,
            timings=timings or Timings(),
            handshake_s=handshake_s,
        )
        self._is_up = False
        self._is_ending = False
        self._pause_s = _REDIAL_S[0]
        self._redialer: asyncio.TimerHandle | None = None
        self._user_id = "" if curve is None else curve.server_public
        self.last_refusal = ""
        """Why the last handshake failed, in words; ``""`` while none has."""
        self._socket.immediate = 1
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = (round(pause * 1000) for pause in _REDIAL_S)
        self._socket.connect_timeout = _CONNECT_TIMEOUT_MS
        if curve is not None:
            self._socket.curve_serverkey = curve.server_public.encode("ascii")
            self._socket.curve_publickey = curve.own.public.encode("ascii")
            self._socket.curve_secretkey = curve.own.secret.encode("ascii")
        self._watch(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_CONNECT_RETRIED)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise BadAddress(
                f"cannot dial {address}",
                evidence=f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}",
                advice="Use the address that the acceptor reports.",
            ) from error

    @property
    def is_up(self) -> bool:
        """Whether the handshake of the present connection has succeeded."""
        return self._is_up

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Queue one message; see ``Transport.send``. Nothing is queued for a later connection.

        Raises:
            UnsendableMessage: the message can be sent to nobody.
        """
        flat, size = flat_frames(frames, self._max_frame_bytes)
        if connection != DIALED or not self._is_up or self._closed:
            return self._unsent() if not self._closed else False
        try:
            self._put(flat)
        except zmq.Again:
            return self._unsent()
        return self._sent(size)

    def _read_message(self) -> bool:
        if self._closed:
            return False
        try:
            first: zmq.Frame = self._recv(NOBLOCK, False)
        except zmq.Again:
            return False
        if not self._is_up and self._monitor is not None:
            self._monitor.pump.drain()  # the word of the connection came before its messages
        frames = self._rest_of_message(first)
        if not self._closed:
            self._handler.on_message(DIALED, frames, self._user_id)
        return True

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._on_empty()
            if self._closed:
                return
            self._is_up = True
            self._pause_s = _REDIAL_S[0]
            # A send without waiting may overlook a pipe that the I/O thread has only just announced.
            self._pump.has_input()
            self._pump.kick()
            self._handler.on_up(DIALED)
        elif event == zmq.EVENT_DISCONNECTED:
            self._is_ending = self._is_up
            self._pump.kick()
            self._plan_redial()
        elif event == zmq.EVENT_CONNECT_RETRIED:
            self._cancel_redial()
        else:
            reason = failure(event, value)
            self.last_refusal = f"{self._address}: {reason} (event {zmq.Event(event).name}, {value:#x})"
            self._refuse(reason)

    def _plan_redial(self) -> None:
        """zmq gives an endpoint up for good after a refused key or a protocol error; if it does not, it says so."""
        if self._redialer is None:
            self._redialer = self._loop.call_later(self._pause_s, self._redial)
            self._pause_s = min(2 * self._pause_s, _REDIAL_S[1])

    def _redial(self) -> None:
        self._redialer = None
        with suppress(zmq.ZMQError):  # zmq may have forgotten the endpoint by itself
            self._socket.disconnect(self._address)
        self._socket.connect(self._address)

    def _cancel_redial(self) -> None:
        if self._redialer is not None:
            self._redialer.cancel()
            self._redialer = None

    def _on_close(self) -> None:
        self._cancel_redial()

    def _on_empty(self) -> None:
        if self._is_ending and not self._closed:
            self._is_ending = self._is_up = False
            self._handler.on_down(DIALED)
