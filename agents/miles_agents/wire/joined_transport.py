"""Two acceptors as one: a controller listens to other machines by tcp, to agents of its own by a unix socket.

Connections keep the names that their acceptor gave them; the names of the two differ in their first byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from miles_agents.wire.transport import Buffer, Connection, Transport, TransportStats
from miles_agents.wire.unix_transport import NAME_PREFIX


class JoinedAcceptor:
    """Passes everything on. ``address`` is that of ``remote``; ``local`` serves the unix socket."""

    def __init__(self, remote: Transport, local: Transport) -> None:
        self._remote = remote
        self._local = local

    @property
    def address(self) -> str:
        """Where other machines dial."""
        return self._remote.address

    @property
    def local_address(self) -> str:
        """Where processes of this machine dial."""
        return self._local.address

    @property
    def stats(self) -> TransportStats:
        """Those of both, added up now."""
        one, two = self._remote.stats, self._local.stats
        reasons = dict(one.reasons)
        for reason, count in two.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        return TransportStats(
            one.sent_messages + two.sent_messages,
            one.sent_bytes + two.sent_bytes,
            one.received_messages + two.received_messages,
            one.received_bytes + two.received_bytes,
            one.unsendable + two.unsendable,
            one.refused + two.refused,
            reasons,
        )

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """By the acceptor that knows the connection."""
        transport = self._local if connection.startswith(NAME_PREFIX) else self._remote
        return transport.send(connection, frames)

    def close(self) -> None:
        """Close both. Idempotent."""
        self._remote.close()
        self._local.close()
