"""The transport between processes of one node: unix stream sockets, read and written on the event loop itself.

ZeroMQ would put an I/O thread of its own on either side of each hop: two more wake-ups per message and direction, each
tens of microseconds, which a call inside a node pays eight times. Between nodes its encryption and reconnecting are
worth that; inside a node the kernel keeps strangers out (a directory of mode 0700, and the peer's user id) and loses
nothing, so plain streams do.

Consumes: messages to send, also from other threads; what the sockets bring. Produces: the callbacks of
``TransportHandler``, on the event loop. Waits for: nothing. Invariants: a connection of another user is closed before
it is read, and a dialer hangs up on a listener of another user; with keys, whoever does not prove its key in time is
hung up on, on both sides; names of connections are not reused; the allow list is asked for every message, because an
open connection outlives the revocation of its key.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from miles_agents.wire.addresses import AddressUnavailable, check_socket_directory, split_address
from miles_agents.wire.frames import flat_frames
from miles_agents.wire.keys import AllowList, KeyPair
from miles_agents.wire.transport import (
    DIALED,
    MAX_FRAME_BYTES,
    Buffer,
    Connection,
    TransportHandler,
    TransportStats,
)
from miles_agents.wire.unix_auth import AcceptorProof, DialerProof
from miles_agents.wire.unix_stream import SMALL_BYTES, Stream

NAME_PREFIX = b"u"
"""Of every connection's name; names that zmq gives begin with a zero byte."""
_BACKLOG = 4096
_ACCEPTS_PER_TURN = 64
_REDIAL_S = (0.1, 5.0)
_CREDENTIALS = struct.Struct("iII")
_HANDSHAKE_FRAME_BYTES = 1024
_ACCEPT_PAUSE_S = 0.1

__all__ = ["UnixAcceptor", "UnixDialer"]


class _Accepted:
    """One connection of an acceptor. ``user_id`` is None until the key is proved, where one is asked for."""

    __slots__ = ("deadline", "name", "proof", "stream", "user_id")

    def __init__(self, name: Connection) -> None:
        self.name = name
        self.stream: Stream | None = None
        self.proof: AcceptorProof | None = None
        self.user_id: str | None = None
        self.deadline: asyncio.TimerHandle | None = None


class UnixAcceptor:
    """The listening side. Each connection is known from its acceptance on.

    Args:
        address: ``unix:///directory/file``; the directory is ours alone.
        handler: Receives the callbacks, on this event loop.
        allow: The keys that may connect, by proof; None: every process of this user may.
        max_frame_bytes: A larger frame costs the peer its connection.
        handshake_s: A peer that has not proved its key by then is dropped.

    Raises:
        UnsafeDirectory, BadAddress: the address is not safe to listen on.
        AddressUnavailable: the system refuses the address, or somebody listens there.
    """

    def __init__(
        self,
        address: str,
        handler: TransportHandler,
        *,
        allow: AllowList | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        handshake_s: float = 10.0,
    ) -> None:
        path = _path_of(address)
        check_socket_directory(path)
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._address = address
        self._allow = allow
        self._stats = TransportStats()
        self._max_frame_bytes = max_frame_bytes
        self._handshake_s = handshake_s
        self._closed = False
        self._num_accepted = 0
        self._accepted: dict[Connection, _Accepted] = {}
        self._socket = _listen(path, address)
        self._file_id = _file_id(path)
        self._pause: asyncio.TimerHandle | None = None
        self._watch()

    @property
    def address(self) -> str:
        """What was bound."""
        return self._address

    @property
    def stats(self) -> TransportStats:
        """Live counters. ``reasons`` counts refusals by reason."""
        return self._stats

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Send one message; see ``Transport.send``.

        Raises:
            UnsendableMessage: the message can be sent to nobody.
        """
        known = self._accepted.get(connection)
        stats = self._stats
        stream = None if known is None or known.user_id is None else known.stream
        sent, size = _send(stream, frames, self._max_frame_bytes)
        if not sent:
            stats.unsendable += not self._closed
            return False
        stats.sent_messages += 1
        stats.sent_bytes += size
        return True

    def close(self) -> None:
        """Close now; what was not sent yet is lost. Nothing is called back afterwards. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for known in list(self._accepted.values()):
            self._let_go(known)
        path = _path_of(self._address)
        if self._file_id is not None and _file_id(path) == self._file_id:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _watch(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._on_connect)

    def _on_connect(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors, mostly: whoever knocks goes on waiting, and the loop must not spin meanwhile.
                self._refuse(f"accept: {errno.errorcode.get(error.errno or 0, 'unknown error')}")
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(_ACCEPT_PAUSE_S, self._watch)
                return
            if _user_of(sock) != os.geteuid():
                sock.close()
                self._refuse("a process of another user")
                continue
            self._meet(sock)

    def _meet(self, sock: socket.socket) -> None:
        self._num_accepted += 1
        known = _Accepted(NAME_PREFIX + self._num_accepted.to_bytes(8, "big"))
        self._accepted[known.name] = known
        if self._allow is None:
            known.user_id = ""
        known.stream = Stream(
            sock,
            self._max_frame_bytes if self._allow is None else _HANDSHAKE_FRAME_BYTES,
            partial(self._on_frames, known),
            partial(self._on_end, known),
        )
        if self._allow is not None:
            known.proof = AcceptorProof(self._allow)
            known.deadline = self._loop.call_later(
                self._handshake_s, self._turn_away, known, "the handshake did not end"
            )
            known.stream.send(known.proof.challenge())

    def _on_frames(self, known: _Accepted, frames: list[Buffer]) -> None:
        user_id = known.user_id
        if user_id is None:
            self._on_proof(known, frames)
            return
        if self._allow is not None and user_id not in self._allow.nodes:
            self._refuse("a message under a key that is not allowed (any more)")
            return
        stats = self._stats
        stats.received_messages += 1
        stats.received_bytes += len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
        self._handler.on_message(known.name, frames, user_id)

    def _on_proof(self, known: _Accepted, frames: list[Buffer]) -> None:
        assert known.proof is not None and known.stream is not None
        answer = known.proof.answer(frames)
        if isinstance(answer, str):
            self._turn_away(known, answer)
            return
        known.user_id, known.proof = known.proof.public, None
        if known.deadline is not None:
            known.deadline.cancel()
        known.stream.max_frame_bytes = self._max_frame_bytes
        known.stream.send(answer)

    def _turn_away(self, known: _Accepted, reason: str) -> None:
        if self._accepted.pop(known.name, None) is not None:
            self._let_go(known)
            self._refuse(reason)

    def _on_end(self, known: _Accepted, _why: str) -> None:
        self._accepted.pop(known.name, None)
        self._let_go(known)
        if known.user_id is not None:
            self._handler.on_down(known.name)
        else:
            self._refuse("it left before it had proved its key")

    def _let_go(self, known: _Accepted) -> None:
        if known.deadline is not None:
            known.deadline.cancel()
        if known.stream is not None:
            known.stream.close()

    def _refuse(self, reason: str) -> None:
        self._stats.refused += 1
        self._stats.reasons[reason] = self._stats.reasons.get(reason, 0) + 1


class UnixDialer:
    """The dialing side: one connection, made again whenever it is gone. ``last_refusal`` says why it is not up.

    Args:
        address: ``unix:///directory/file``.
        handler: Receives the callbacks, on this event loop.
        key: This node's key pair, where the acceptor asks for a proof.
        max_frame_bytes: A larger frame costs the peer its connection.
        handshake_s: An acceptor that has not proved itself by then is hung up on.

    Raises:
        BadAddress: not a unix address.
    """

    def __init__(
        self,
        address: str,
        handler: TransportHandler,
        *,
        key: KeyPair | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        handshake_s: float = 10.0,
    ) -> None:
        self._path = _path_of(address)
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._address = address
        self._key = key
        self._stats = TransportStats()
        self._max_frame_bytes = max_frame_bytes
        self._handshake_s = handshake_s
        self._closed = False
        self._is_up = False
        self._stream: Stream | None = None
        self._proof: DialerProof | None = None
        self._pause_s = _REDIAL_S[0]
        self._timer: asyncio.TimerHandle | asyncio.Handle = self._loop.call_soon(self._dial)
        self.last_refusal = ""

    @property
    def address(self) -> str:
        """What was dialed."""
        return self._address

    @property
    def stats(self) -> TransportStats:
        """Live counters."""
        return self._stats

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Send one message, from any thread; see ``Transport.send``. Nothing is kept for a later connection.

        Raises:
            UnsendableMessage: the message can be sent to nobody.
        """
        stream = self._stream if self._is_up and connection == DIALED else None
        sent, size = _send(stream, frames, self._max_frame_bytes)
        if not sent:
            self._stats.unsendable += not self._closed
            return False
        self._stats.sent_messages += 1
        self._stats.sent_bytes += size
        return True

    def close(self) -> None:
        """Close now; what was not sent yet is lost. Nothing is called back afterwards. Idempotent."""
        self._closed = True
        self._is_up = False
        self._timer.cancel()
        if self._stream is not None:
            self._stream.close()

    def _dial(self) -> None:
        sock: socket.socket | None = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.connect(os.fspath(self._path))
            is_ours = _user_of(sock) == os.geteuid()
            if is_ours:
                self._stream = Stream(sock, self._max_frame_bytes, self._on_frames, self._on_end)
        except OSError as error:  # nobody listens, or this process has no descriptor left: both may pass
            if sock is not None:
                sock.close()
            self._redial_later(f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}")
            return
        if not is_ours:
            sock.close()
            self._refuse("a process of another user listens there")
            return
        if self._key is None:
            self._up()
        else:
            self._proof = DialerProof(self._key)
            self._timer = self._loop.call_later(self._handshake_s, self._give_up, "the handshake did not end")

    def _up(self) -> None:
        self._timer.cancel()
        self._is_up = True
        self._pause_s = _REDIAL_S[0]
        self._handler.on_up(DIALED)

    def _on_frames(self, frames: list[Buffer]) -> None:
        if self._proof is not None:
            self._on_proof(frames)
            return
        stats = self._stats
        stats.received_messages += 1
        stats.received_bytes += len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
        self._handler.on_message(DIALED, frames, "")

    def _on_proof(self, frames: list[Buffer]) -> None:
        assert self._proof is not None and self._stream is not None
        try:
            answer = self._proof.answer(frames)
        except ValueError as error:
            self._give_up(str(error))
            return
        if answer is not None:
            self._stream.send(answer)
        else:
            self._proof = None
            self._up()

    def _give_up(self, why: str) -> None:
        if self._stream is not None:
            self._stream.close()
        self._refuse(why)

    def _refuse(self, why: str) -> None:
        self._stats.refused += 1
        self._stats.reasons[why] = self._stats.reasons.get(why, 0) + 1
        self._redial_later(why)

    def _on_end(self, why: str) -> None:
        was_up, self._is_up = self._is_up, False
        self._redial_later(why if was_up else f"turned away ({why})")
        if was_up:
            self._handler.on_down(DIALED)

    def _redial_later(self, why: str) -> None:
        self.last_refusal = f"{self._address}: {why}"
        self._stream = self._proof = None
        self._timer.cancel()
        if not self._closed:
            self._timer = self._loop.call_later(self._pause_s, self._dial)
            self._pause_s = min(2 * self._pause_s, _REDIAL_S[1])


def _user_of(sock: socket.socket) -> int:
    """Whose process is at the other end: who connected, or who began to listen."""
    uid: int = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
    return uid


def _send(stream: Stream | None, frames: Sequence[Buffer], max_frame_bytes: int) -> tuple[bool, int]:
    """Whether a message was taken, and its size. Raises UnsendableMessage."""
    if len(frames) == 1:
        frame = frames[0]
        if type(frame) is bytes and len(frame) <= SMALL_BYTES:
            return stream is not None and stream.send_small(frame), len(frame)
    flat, size = flat_frames(frames, max_frame_bytes)
    return stream is not None and stream.send(flat), size


def _path_of(address: str) -> Path:
    """The path of a ``unix://`` address. Raises BadAddress."""
    return Path(split_address(address, "unix"))


def _listen(path: Path, address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        try:
            sock.bind(os.fspath(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            os.unlink(path)
            sock.bind(os.fspath(path))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise AddressUnavailable(
            f"cannot listen on {address}",
            evidence=f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}",
            advice="Choose a path that nothing else uses, in a directory of your own.",
        ) from error
    return sock


def _is_left_over(path: Path) -> bool:
    """Whether a socket file has nobody behind it: its process was killed."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(os.fspath(path))
    except ConnectionRefusedError:
        return path.is_socket()
    except OSError:
        return False
    finally:
        probe.close()
    return False


def _file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, None if there is none."""
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino
