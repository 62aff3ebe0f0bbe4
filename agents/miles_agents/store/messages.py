"""What workers and their agent's store say to each other: one msgpack message per packet, descriptors beside it.

A worker asks, the agent answers each question once, in order; several questions at once need several connections.
The first message of a connection is HELLO with the worker's token.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from miles_agents.errors import MilesError
from miles_agents.wire.remote_error import describe_exception, rebuild_exception

HELLO, ALLOC, COMMIT, GET, REMOVE, RELEASE = "hello", "alloc", "commit", "get", "remove", "release"
REMOVE_LEFT = "remove_left"
OK, ERROR = "ok", "error"
MAX_PACKET = 192 * 1024
MAX_PARTS = 4096
"""Parts of one put; a packet holds the places of so many."""
_PEERCRED = struct.Struct("3i")


def send(channel: socket.socket, message: Sequence[Any], fd: int | None = None) -> None:
    """Send a message, and a descriptor with it. Raises OSError."""
    data = msgpack.packb(message)
    fds = [] if fd is None else [fd]
    if len(data) > MAX_PACKET:
        raise ValueError(f"a message of {len(data)} bytes")
    if fds:
        socket.send_fds(channel, [data], fds)
    else:
        channel.send(data)


def receive(channel: socket.socket) -> tuple[list[Any], int | None]:
    """The next message and its descriptor. Raises EOFError at the end, ValueError for garbage, OSError."""
    data, fds, flags, _ = socket.recv_fds(channel, MAX_PACKET + 1, 4, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
            raise ValueError("a message that is too long, or with too many descriptors")
        message = msgpack.unpackb(data)
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise ValueError("a message of another form")
    except Exception as error:  # boundary: bytes of another process; descriptors that came with them must not stay
        for fd in fds:
            os.close(fd)
        if isinstance(error, EOFError):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return message, fds[0] if fds else None


def describe(error: MilesError) -> list[Any]:
    """An error as a message; one with very much to say is cut."""
    described = describe_exception(error, None, [])
    if len(msgpack.packb(described)) > MAX_PACKET - 1024:
        short = type(error)(error.what, evidence=error.evidence[:8192], advice=error.advice)
        described = describe_exception(short, None, [])
    return [ERROR, described]


def rebuild(message: list[Any]) -> MilesError:
    """The error of an ERROR message."""
    return rebuild_exception(message[1])


def uid_of_peer(channel: socket.socket) -> int:
    """The user at the other end, as the kernel says."""
    raw = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    uid: int = _PEERCRED.unpack(raw)[1]
    return uid
