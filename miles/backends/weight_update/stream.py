"""The connection that carries an update's buckets from a trainer's rank to an engine's rank. No torch.

One HTTP request per update tells an engine where to connect to; everything after that goes through here, so that a
bucket costs a message instead of a request. Messages are msgpack maps, each behind its length; ``WeightStream`` in
``stream_sender`` and ``sglang_utils.receive_weights`` are the two ends:

    engine    hello: token, engine, rank, group (the process group that it is in, if any)
    trainer   join: where a process group gathers           engine  joined        (broadcast, if the group is new)
    trainer   bucket: number, entries, and where it lies    engine  loaded: number, seconds
    trainer   end                                           engine  done
    either    error: text, after which nothing follows

* Waits: a send or a receive ends after ``timeout_s``, and at once when the other side is gone.
* Invariant: who does not know the token of the update is let go before anything is read into memory.
"""

from __future__ import annotations

import contextlib
import hmac
import multiprocessing.connection
import os
import secrets
import select
import socket
import struct
import urllib.parse
from dataclasses import dataclass
from typing import Any

import msgpack

_HELLO_BYTES = 4096
_HELLO_S = 1.0
_MESSAGE_BYTES = 1 << 28
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
"""A host that has vanished is noticed after half a minute."""


class StreamBroken(Exception):
    """The other side is gone, silent for too long, or has said why it cannot go on."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trainer's rank listens, and what whoever connects has to know."""

    host: str
    port: int
    token: str


class Line:
    """One end of a connection. ``close`` it: the other end notices."""

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        connected.setblocking(True)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connected
        self.limit(timeout_s)
        self._connection = multiprocessing.connection.Connection(os.dup(connected.fileno()))

    def limit(self, timeout_s: float) -> None:
        """From now on, waits end after so long."""
        seconds = int(timeout_s)
        value = struct.pack("ll", seconds, int((timeout_s - seconds) * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Raises StreamBroken."""
        try:
            self._connection.send_bytes(msgpack.packb(message))
        except OSError as error:
            raise StreamBroken(_why(error)) from None

    def receive(self, max_bytes: int = _MESSAGE_BYTES) -> dict[str, Any]:
        """Raises StreamBroken."""
        try:
            message = msgpack.unpackb(self._connection.recv_bytes(max_bytes))
        except EOFError:
            raise StreamBroken("the other side is gone") from None
        except (OSError, ValueError, msgpack.UnpackException) as error:
            raise StreamBroken(_why(error)) from None
        if not isinstance(message, dict):
            raise StreamBroken("what came was no message")
        if "error" in message:
            raise StreamBroken(str(message["error"]))
        return message

    def has_message(self) -> bool:
        """Whether ``receive`` has something to read, if only the end."""
        return bool(select.select([self._socket], [], [], 0.0)[0])

    def is_over(self) -> bool:
        """Whether the other side is gone and everything it said has been read."""
        if not self.has_message():
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Let the other side know that nothing follows."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._connection.close()


class Listener:
    """Of one update, on one rank of the trainer. A context manager."""

    def __init__(self, host: str, timeout_s: float) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self._socket.setblocking(False)
        self._timeout_s = timeout_s
        self._strangers: list[Line] = []
        self.place = Place(host, self._socket.getsockname()[1], secrets.token_hex(32))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for line in self._strangers:
            line.close()
        self._strangers.clear()

    def accept(self, wait_s: float) -> tuple[Line, dict[str, Any]] | None:
        """A connection that has said the token, with its hello; None: there was none within ``wait_s``."""
        watched: list[Any] = [self._socket, *self._strangers]
        ready = select.select(watched, [], [], wait_s)[0]
        if self._socket in ready:
            with contextlib.suppress(OSError):  # gone again
                self._strangers.append(Line(self._socket.accept()[0], _HELLO_S))
        for line in [line for line in self._strangers if line in ready]:
            self._strangers.remove(line)
            hello = self._hello(line)
            if hello is not None:
                line.limit(self._timeout_s)
                return line, hello
            line.close()
        return None

    def _hello(self, line: Line) -> dict[str, Any] | None:
        try:
            hello = line.receive(_HELLO_BYTES)
        except StreamBroken:
            return None
        return hello if hmac.compare_digest(str(hello.get("token")), self.place.token) else None


def connect(place: Place, hello: dict[str, Any], timeout_s: float) -> Line:
    """An engine's end. Raises StreamBroken."""
    try:
        connected = socket.create_connection((place.host, place.port), timeout=min(timeout_s, 30.0))
    except OSError as error:
        raise StreamBroken(f"the trainer at {place.host} port {place.port} cannot be reached: {_why(error)}") from None
    line = Line(connected, timeout_s)
    line.send(hello | {"token": place.token})
    return line


def address_towards(host: str, port: int) -> str:
    """This host's address as that one sees it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def host_and_port(url: str) -> tuple[str, int]:
    """Of ``http://host:port``."""
    parts = urllib.parse.urlsplit(url)
    return parts.hostname or "", parts.port or 0


def _why(error: BaseException) -> str:
    if isinstance(error, BlockingIOError):
        return "the other side said nothing for too long"
    return str(error) or type(error).__name__
