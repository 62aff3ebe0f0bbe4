"""What the session layer needs of a network: frames to peers, and word of peers coming and going.

Three implement it and pass the same contract tests: ``zmq_transport`` (tcp with CURVE, between nodes),
``unix_transport`` (within a node) and ``memory_transport`` (one process, virtual clock, faults on demand). A transport
promises little on purpose:

* frames to one peer arrive whole or not at all, and never mixed with another message's frames;
* a frame may be lost, also without notice (the twin with faults also repeats and reorders): sessions mend that;
* ``on_down`` may come late or twice, so it is a hint; a lost peer is a verdict that liveness reaches elsewhere.

Callbacks run on the event loop that the transport was started on; they must not block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

Buffer: TypeAlias = bytes | bytearray | memoryview
"""One frame. A received frame is a ``memoryview`` that keeps its memory alive, or ``bytes`` if small."""

Connection: TypeAlias = bytes
"""One connection to one peer, as the transport names it. A reconnected peer has a new one; names are not reused."""


class TransportHandler(Protocol):
    """Receives what a transport has to say. One handler per transport, given at construction."""

    def on_up(self, connection: Connection) -> None:
        """A dialer is connected (again). Acceptors learn of a peer by its first message instead."""

    def on_down(self, connection: Connection) -> None:
        """The connection is gone, as far as the transport can tell."""

    def on_message(self, connection: Connection, frames: Sequence[Buffer], user_id: str) -> None:
        """A whole message. ``user_id`` is the authenticated public key (Z85), or ``""`` where there is none."""


@dataclass(slots=True)
class TransportStats:
    """Counters since the start. ``refused`` counts handshakes and messages of strangers."""

    sent_messages: int = 0
    sent_bytes: int = 0
    received_messages: int = 0
    received_bytes: int = 0
    unsendable: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@runtime_checkable
class Transport(Protocol):
    """One socket: an acceptor with many connections, or a dialer with one (``DIALED``)."""

    @property
    def address(self) -> str:
        """Where peers dial (acceptor: with the port that was really bound) or what was dialed."""

    @property
    def stats(self) -> TransportStats:
        """Live counters."""

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Queue one message without blocking. False: not sent, the peer is away or was never there.

        Frames of ``ZERO_COPY_BYTES`` and more are not copied: they must not change until the peer has them.
        Received ones of that size are views of the message's own memory, and writable.

        Raises:
            UnsendableMessage: no frames, or one that is larger than the transport's limit.
        """

    def close(self) -> None:
        """Close now, without lingering. Nothing is called back afterwards. Idempotent."""


DIALED: Connection = b""
"""The one connection of a dialer."""

ZERO_COPY_BYTES = 64 * 1024
"""From this size on a buffer travels as a frame of its own and is not copied by the sender."""

MAX_FRAME_BYTES = 320 * 1024 * 1024
"""Larger frames are refused by the socket and the connection is dropped."""
