"""Who may connect: rules for addresses, the ZAP handler that checks CURVE keys, and the network that owns it.

Consumes: address strings; authentication requests of the zmq context (RFC 27, ZAP 1.0).
Produces: errors for unsafe addresses; one verdict per handshake, with the public key as ``User-Id``.
Waits for: nothing. The handler is drained by the event loop; a handshake waits in zmq's I/O thread meanwhile.

Invariants:
    * CURVE alone authenticates nobody (any fresh key gets in), so a tcp acceptor has an allow list, always.
    * The handler answers every request, exactly once, and says no to whatever it does not understand.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import zmq
from zmq.utils import z85

from miles_agents.errors import ConfigError, EnvironmentFault
from miles_agents.wire.keys import AllowList, KeyPair

ZmqSocket: TypeAlias = zmq.Socket[bytes]

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
"""Fixed by RFC 27; one handler per zmq context."""

_ZAP_VERSION = b"1.0"
_ANY_INTERFACE = frozenset({"*", "0.0.0.0", "[::]", "::", "[0:0:0:0:0:0:0:0]"})  # noqa: S104 - refused below
_REMEMBERED_REFUSALS = 64
_REQUESTS_PER_TURN = 64


class InsecureAddress(ConfigError):
    """A tcp address without keys, without an allow list, or on every interface unasked."""

    code = "E-ADDR-001"


class UnsafeDirectory(EnvironmentFault):
    """The directory of an ipc address is missing, not ours, or open to others."""

    code = "E-ADDR-002"


class BadAddress(ConfigError):
    """An address is neither ``tcp://host:port`` nor ``ipc:///path``, or its path is too long for a socket."""

    code = "E-ADDR-003"


def check_acceptor_address(
    address: str, *, curve: KeyPair | None, allow: AllowList | None, any_interface: bool
) -> None:
    """Refuse to listen where strangers could connect.

    Raises:
        BadAddress: unknown scheme, abstract or overlong ipc path.
        InsecureAddress: tcp without CURVE and allow list, or on all interfaces without ``any_interface``.
        UnsafeDirectory: the ipc directory is not ours alone (mode 0700).
    """
    scheme, rest = split_address(address)
    if scheme == "ipc":
        check_ipc_directory(Path(rest))
        return
    if curve is None or allow is None:
        missing = "no CURVE key" if curve is None else "no allow list (any fresh key would get in)"
        raise InsecureAddress(
            f"refusing to listen on {address}",
            evidence=f"a tcp socket with {missing}",
            advice="Pass the run's key pair and an allow list, or use an ipc address.",
        )
    host = rest.rpartition(":")[0]
    if host in _ANY_INTERFACE and not any_interface:
        raise InsecureAddress(
            f"refusing to listen on {address}",
            evidence="that is every interface of this machine",
            advice="Name the interface or address of the cluster network, or ask for any interface explicitly.",
        )


def check_dialer_address(address: str, *, encrypted: bool) -> None:
    """Refuse to dial tcp in plain text.

    Raises:
        BadAddress: unknown scheme, abstract or overlong ipc path.
        InsecureAddress: tcp without keys.
    """
    scheme, _ = split_address(address)
    if scheme == "tcp" and not encrypted:
        raise InsecureAddress(
            f"refusing to dial {address}",
            evidence="a tcp connection without CURVE keys",
            advice="Pass the server's public key and this node's key pair.",
        )


def split_address(address: str, schemes: tuple[str, ...] = ("tcp", "ipc")) -> tuple[str, str]:
    """``("tcp", "host:port")``, ``("ipc", "/path")`` or ``("unix", "/path")``, of the ``schemes`` that will do.

    Raises:
        BadAddress: anything else.
    """
    scheme, separator, rest = address.partition("://")
    problem = ""
    if not separator or scheme not in schemes:
        problem = f"the scheme is not {' or '.join(schemes)}"
    elif scheme == "tcp" and not all(rest.rpartition(":")):
        problem = "a tcp address needs a host and a port"
    elif scheme != "tcp" and not rest.startswith("/"):
        problem = f"an {scheme} address needs an absolute path (abstract sockets have no permissions)"
    elif scheme != "tcp" and len(os.fsencode(rest)) > zmq.IPC_PATH_MAX_LEN:
        problem = f"the path has {len(os.fsencode(rest))} bytes, more than the {zmq.IPC_PATH_MAX_LEN} of a socket"
    if problem:
        advice = "Use tcp://HOST:PORT, or unix:// with a short absolute path."
        raise BadAddress(f"{address!r} is not an address that we can use", evidence=problem, advice=advice)
    return scheme, rest


def check_ipc_directory(socket_path: Path) -> None:
    """The directory of ``socket_path`` must be ours and closed to everybody else.

    Raises:
        UnsafeDirectory: missing, a link, owned by another user, or group or others may enter it.
    """
    directory = socket_path.parent
    try:
        facts = directory.lstat()
    except OSError as error:
        problem = f"{type(error).__name__}: {error.strerror}"
    else:
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISDIR(facts.st_mode):
            problem = "it is not a directory (links are not followed)"
        elif facts.st_uid != os.geteuid():
            problem = f"it belongs to user id {facts.st_uid}, we are {os.geteuid()}"
        elif mode & 0o077:
            problem = f"its mode is {mode:04o}, others can reach the socket"
        else:
            return
    raise UnsafeDirectory(
        f"cannot put a socket into {directory}",
        evidence=problem,
        advice=f"Create it for yourself only: mkdir -m 0700 {directory}",
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """One handshake that was turned away. ``at`` is loop time; ``public_key`` is ``""`` if none was shown."""

    at: float
    address: str
    public_key: str
    reason: str


class ZapHandler:
    """Answers the authentication requests of one zmq context from allow lists, on the running event loop.

    Each acceptor has its own ZAP domain, so several acceptors of one context keep separate allow lists.
    Only CURVE is accepted. ``refused`` counts, ``refusals`` remembers the last few.
    """

    def __init__(self, context: zmq.Context[ZmqSocket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._lists: dict[str, AllowList] = {}
        self.accepted = 0
        self.refused = 0
        self.refusals: deque[Refusal] = deque(maxlen=_REMEMBERED_REFUSALS)
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        self._fd = self._socket.fileno()
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)

    def admit(self, allow: AllowList) -> str:
        """A new domain whose handshakes are checked against ``allow``; for the acceptor's ``ZAP_DOMAIN``."""
        domain = f"domain-{len(self._lists)}"
        self._lists[domain] = allow
        return domain

    def close(self) -> None:
        """Stop answering: handshakes that still wait fail. Idempotent."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def _drain(self) -> None:
        # The socket sends only here, between two receives, so no edge of its FD can be lost elsewhere.
        if self._socket.closed:
            return
        for _ in range(_REQUESTS_PER_TURN):
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(request), zmq.NOBLOCK)
        self._loop.call_soon(self._drain)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """``[version, request id, status, text, user id, metadata]`` for RFC 27's request frames."""
        version, request_id, domain, address, _routing_id, mechanism, *credentials = [*request, *[b""] * 6][
            : max(len(request), 6)
        ]
        key = z85.encode(credentials[0]).decode("ascii") if credentials and len(credentials[0]) == 32 else ""
        reason = self._reason(version, domain, mechanism, key)
        if reason:
            self.refused += 1
            where = address.decode("ascii", "replace")
            self.refusals.append(Refusal(self._loop.time(), where, key, reason))
            return [_ZAP_VERSION, request_id, b"400", reason.encode("ascii"), b"", b""]
        self.accepted += 1
        return [_ZAP_VERSION, request_id, b"200", b"OK", key.encode("ascii"), b""]

    def _reason(self, version: bytes, domain: bytes, mechanism: bytes, key: str) -> str:
        """Why a handshake is refused, or ``""``."""
        if version != _ZAP_VERSION:
            return "unknown ZAP version"
        if mechanism != b"CURVE" or not key:
            return "not a CURVE handshake"
        allow = self._lists.get(domain.decode("ascii", "replace"))
        if allow is None:
            return "unknown domain"
        return "" if key in allow else "key not in the allow list"


class Closable(Protocol):
    """What lives on a network."""

    def close(self) -> None:
        """Close now. Idempotent."""


class ZmqNetwork:
    """Owns one zmq context, its key check, and the transports made on it; ``close`` ends them all.

    Two networks of one process share nothing, so several controllers or agents can live side by side.
    """

    def __init__(self) -> None:
        self.context: zmq.Context[ZmqSocket] = zmq.Context(io_threads=1)
        self._zap: ZapHandler | None = None
        self._transports: list[Closable] = []
        self._num_endpoints = 0

    @property
    def zap(self) -> ZapHandler:
        """The key check of this context; starts with its first use."""
        if self._zap is None:
            self._zap = ZapHandler(self.context)
        return self._zap

    def close(self) -> None:
        """Close every transport, the key check and the context; ipc files are gone on return. Idempotent."""
        if self.context.closed:
            return
        for transport in tuple(self._transports):
            transport.close()
        if self._zap is not None:
            self._zap.close()
        if not self.context.closed:  # a transport that owns its network has closed it meanwhile
            self.context.term()

    def enter(self, transport: Closable) -> None:
        """A transport begins to use the context."""
        self._transports.append(transport)

    def leave(self, transport: Closable) -> None:
        """A transport has closed its sockets."""
        self._transports.remove(transport)

    def new_endpoint(self) -> str:
        """A fresh address for sockets within this context."""
        self._num_endpoints += 1
        return f"inproc://internal-{self._num_endpoints}"
