"""The connection that carries an update's buckets from a trainer's rank to an engine's rank. No torch.

One HTTP request per update tells an engine where to connect to; everything after that goes through here, so that a
bucket costs a message instead of a request. Messages are msgpack maps, each behind its length; ``lines.Lines`` and
``sglang_utils.receive_weights`` are the two ends:

    engine    hello: token, engine, rank, group (the process group that it is in, if any)
    trainer   join: where a process group gathers           engine  joined        (broadcast, if the group is new)
    trainer   bucket: number, entries, and where it lies    engine  loaded: number, seconds (once more in the end, of
              (stays: as it is until the end)                       what stays: until the device has read it)
    trainer   end                                           engine  done
    engine    cut off: why (a broadcast did not arrive, which is no fault of its own), after which nothing follows
    either    error: text, after which nothing follows

* Waits: a send or a receive ends after ``timeout_s``, and at once when the other side is gone.
* Invariants: who does not know the token of the update is let go before more than a hello is read; nobody waits for
  strangers, however slowly they speak.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import struct
import time
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

_LENGTH = struct.Struct("!I")
_HELLO_BYTES = 4096
_HELLO_S = 10.0
_STRANGERS = 64
"""So many connections that have not said the token yet are held at once; the oldest goes first."""
_MESSAGE_BYTES = 1 << 28
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
_POLL_S = 0.001
_LOOK_S = 0.002
_GONE = "the other side is gone"


class StreamBroken(Exception):
    """The other side is gone, silent for too long, or has said why it cannot go on."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trainer's rank listens, and what whoever connects has to know."""

    host: str
    port: int
    token: str = field(repr=False)


class Line:
    """One end of a connection. ``close`` it: the other end notices."""

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(connected)
        self._socket = connected
        self.limit(timeout_s)

    def limit(self, timeout_s: float) -> None:
        """From now on, waits end after so long."""
        self._timeout_s = timeout_s
        self._socket.settimeout(timeout_s)

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Raises StreamBroken."""
        packed = msgpack.packb(message)
        try:
            self._socket.sendall(_LENGTH.pack(len(packed)) + packed)
        except OSError as error:
            raise StreamBroken(_why(error)) from None

    def receive(self, max_bytes: int = _MESSAGE_BYTES) -> dict[str, Any]:
        """Raises StreamBroken."""
        deadline = time.monotonic() + self._timeout_s
        try:
            size = _LENGTH.unpack(self._read(_LENGTH.size, deadline))[0]
            if size > max_bytes:
                raise StreamBroken(f"a message of {size} bytes came; at most {max_bytes} are taken")
            message = msgpack.unpackb(self._read(size, deadline))
        except (OSError, ValueError, msgpack.UnpackException) as error:
            raise StreamBroken(_why(error)) from None
        if not isinstance(message, dict):
            raise StreamBroken("what came was no message")
        if "error" in message:
            raise StreamBroken(str(message["error"]))
        return message

    def has_message(self) -> bool:
        """Whether ``receive`` has something to read, if only the end."""
        return bool(readable([self.fileno()], 0.0))

    def has_whole_message(self, max_bytes: int) -> bool:
        """Whether ``receive`` would not wait. ``max_bytes``: of a message that may come, small enough for a socket to
        hold. Raises StreamBroken: it is larger, or the other side is gone."""
        if not self.has_message():
            return False
        try:
            held = self._socket.recv(_LENGTH.size + max_bytes, socket.MSG_PEEK)
        except OSError as error:
            raise StreamBroken(_why(error)) from None
        if not held:
            raise StreamBroken(_GONE)
        if len(held) < _LENGTH.size:
            return False
        size = _LENGTH.unpack_from(held)[0]
        if size > max_bytes:
            raise StreamBroken(f"a message of {size} bytes came; at most {max_bytes} are taken")
        return bool(len(held) >= _LENGTH.size + size)

    def is_over(self) -> bool:
        """Whether the other side is gone, also if there is something left to read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Let the other side know that nothing follows."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int, deadline: float) -> bytearray:
        """Raises OSError, StreamBroken."""
        data = bytearray(size)
        left = memoryview(data)
        while left:
            if time.monotonic() > deadline:
                raise TimeoutError
            count = self._socket.recv_into(left)
            if not count:
                raise StreamBroken(_GONE)
            left = left[count:]
        return data


class Listener:
    """Of one update, on one rank of the trainer. A context manager."""

    def __init__(self, host: str, timeout_s: float, *, hello_s: float = _HELLO_S) -> None:
        self._socket = socket.create_server((host, 0), family=_family(host))
        self._socket.setblocking(False)
        self._timeout_s = timeout_s
        self._hello_s = hello_s
        self._strangers: dict[Line, float] = {}
        self.place = Place(host, self._socket.getsockname()[1], secrets.token_hex(32))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody comes in any more: who has connected and was not taken finds that out."""
        self._socket.close()
        for line in self._strangers:
            line.close()
        self._strangers.clear()

    def accept(self, wait_s: float) -> tuple[Line, dict[str, Any]] | None:
        """A connection that has said the token, with its hello; None: there was none within ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while (came := self._introduced()) is None:
            left = deadline - time.monotonic()
            self._take_in(max(left, 0.0))
            if left <= 0.0:
                return self._introduced()
        return came

    def _take_in(self, wait_s: float) -> None:
        """Wait until somebody connects, or speaks."""
        # Whoever has begun to speak, and is not done, would end every wait at once: they are looked at now and then.
        silent = [line.fileno() for line in self._strangers if not line.has_message()]
        wait_s = min(wait_s, _LOOK_S) if len(silent) < len(self._strangers) else wait_s
        if self._socket.fileno() in readable([self._socket.fileno(), *silent], wait_s):
            with contextlib.suppress(OSError):  # gone again
                self._strangers[Line(self._socket.accept()[0], self._timeout_s)] = time.monotonic() + self._hello_s

    def _introduced(self) -> tuple[Line, dict[str, Any]] | None:
        """The first that has said the token. Lets go of those that are too slow, or too many."""
        for line, until in list(self._strangers.items()):
            hello = self._hello(line, until)
            if hello is not None:
                del self._strangers[line]
                return line, hello
        for line in list(self._strangers)[:-_STRANGERS]:
            self._let_go(line)
        return None

    def _hello(self, line: Line, until: float) -> dict[str, Any] | None:
        """None: not yet, or it was let go."""
        try:
            if not line.has_whole_message(_HELLO_BYTES):
                if time.monotonic() > until:
                    self._let_go(line)
                return None
            hello = line.receive(_HELLO_BYTES)
        except StreamBroken:
            self._let_go(line)
            return None
        if hmac.compare_digest(str(hello.get("token")).encode(), self.place.token.encode()):
            return hello
        self._let_go(line)
        return None

    def _let_go(self, line: Line) -> None:
        del self._strangers[line]
        line.close()


def connect(place: Place, hello: dict[str, Any], timeout_s: float) -> Line:
    """An engine's end. Raises StreamBroken."""
    connected = socket.socket(_family(place.host))  # no look-up: ``place`` has an address, and this is waited for
    connected.settimeout(min(timeout_s, 30.0))
    try:
        connected.connect((place.host, place.port))
    except OSError as error:
        connected.close()
        raise StreamBroken(f"the trainer at {place.host} port {place.port} cannot be reached: {_why(error)}") from None
    line = Line(connected, timeout_s)
    try:
        line.send(hello | {"token": place.token})
    except StreamBroken:
        line.close()
        raise
    return line


def readable(filenos: Iterable[int], wait_s: float) -> list[int]:
    """Those of these descriptors that have something to read, if only their end, after waiting so long for a first.

    By ``poll``: ``select`` does not take more than 1024 descriptors, and ``poll`` none of less than a millisecond.
    """
    poll = select.poll()
    for fileno in filenos:
        poll.register(fileno, select.POLLIN)
    found = poll.poll(0)
    if not found and wait_s > 0.0:
        if wait_s < _POLL_S:
            time.sleep(wait_s)
        found = poll.poll(wait_s * 1e3 if wait_s >= _POLL_S else 0)
    return [fileno for fileno, _ in found]


def keep_alive(connected: socket.socket) -> None:
    """A host that has vanished is noticed after half a minute."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


def address_towards(host: str, port: int) -> str:
    """This host's address as that one sees it."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def host_and_port(url: str) -> tuple[str, int]:
    """Of ``http://host:port``."""
    parts = urllib.parse.urlsplit(url)
    return parts.hostname or "", parts.port or 0


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the other side said nothing for too long"
    return str(error) or type(error).__name__
