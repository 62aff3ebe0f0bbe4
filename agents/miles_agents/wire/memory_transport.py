"""The transport's twin in memory: one process, one event loop, any clock, and every fault on demand.

Consumes: messages to send; orders to misbehave (``Faults``, ``partition``, ``freeze``, ``cut``). Produces: the
callbacks of ``TransportHandler``. Waits for: timers only, so on ``virtual_time`` it costs no time and repeats
exactly for one seed.

Every endpoint stands on a *host*; faults are between hosts, and each direction has its own. What the twin copies
from the real transport: messages of one direction keep their order; an acceptor learns of a connection by its first
message; a connection on which nothing passes is dropped by both sides after ``silence_s``; a dialer tries again
after 0.1 s, doubling up to 5 s; what was sent and not delivered when a connection breaks is lost; a key is checked
when the connection is made and again for every message.

Invariant: no memory is shared between the two sides. A frame below ``ZERO_COPY_BYTES`` arrives as ``bytes``, a
larger one as a writable ``memoryview`` of a copy.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence

from miles_agents.wire.addresses import AddressUnavailable
from miles_agents.wire.memory_link import Faults, Lane, Link, isolated
from miles_agents.wire.transport import (
    DIALED,
    Buffer,
    Connection,
    TransportHandler,
    TransportStats,
)

__all__ = ["Faults", "MemoryAcceptor", "MemoryDialer", "MemoryNetwork"]

_RECONNECT_S = (0.1, 5.0)


class MemoryNetwork:
    """All endpoints of one simulated network, and the switch for its faults.

    Args:
        seed: Of all chance here.
        latency_s: One-way delay of every message.
        silence_s: How long a connection lives while one of its directions is blocked or one of its hosts frozen.
    """

    def __init__(self, *, seed: int = 0, latency_s: float = 0.0002, silence_s: float = 5.0) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - chance of faults, no secret
        self.latency_s = latency_s
        self.silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._acceptors: dict[str, MemoryAcceptor] = {}
        self._dialers: dict[MemoryDialer, None] = {}
        self._links: dict[Connection, Link] = {}
        self._faults: dict[tuple[str, str], Faults] = {}
        self._blocked: dict[tuple[str, str], None] = {}
        self._frozen: dict[str, deque[Callable[[], None]]] = {}
        self._num_links = 0
        self._num_dialers = 0

    def acceptor(
        self,
        address: str,
        handler: TransportHandler,
        *,
        host: str = "",
        allow: Callable[[str], bool] | None = None,
    ) -> MemoryAcceptor:
        """Listen on ``address`` (any text; host default: the address). ``allow`` judges user ids, as ZAP would.

        Raises:
            AddressUnavailable: the address is taken.
        """
        if address in self._acceptors:
            raise AddressUnavailable(
                f"cannot listen on {address}",
                evidence="another acceptor of this network has the address",
                advice="Close the other one first, or choose another address.",
            )
        acceptor = MemoryAcceptor(self, address, handler, host or address, allow)
        self._acceptors[address] = acceptor
        return acceptor

    def dialer(self, address: str, handler: TransportHandler, *, host: str = "", user_id: str = "") -> MemoryDialer:
        """Dial ``address``, now and whenever the connection breaks; it need not exist yet."""
        self._num_dialers += 1
        dialer = MemoryDialer(self, address, handler, host or f"dialer-{self._num_dialers}", user_id)
        self._dialers[dialer] = None
        return dialer

    def set_faults(self, source: str, target: str, faults: Faults) -> None:
        """Faults of messages from one host to another (this direction only), from now on."""
        self._faults[source, target] = faults

    def partition(self, a: str, b: str, *, one_way: bool = False) -> None:
        """Let nothing pass from host ``a`` to ``b``, nor back unless ``one_way``. Messages are lost, not kept."""
        self._blocked[a, b] = None
        if not one_way:
            self._blocked[b, a] = None
        self._review_links()

    def heal(self, a: str, b: str) -> None:
        """Let messages pass again in both directions."""
        self._blocked.pop((a, b), None)
        self._blocked.pop((b, a), None)
        self._review_links()

    def freeze(self, host: str) -> None:
        """Stop a host as SIGSTOP would: it hears nothing and what it sends stays inside until ``thaw``."""
        self._frozen.setdefault(host, deque())
        self._review_links()

    def thaw(self, host: str) -> None:
        """Let a frozen host go on: what came and what it sent meanwhile passes now, in the order of then."""
        held = self._frozen.pop(host, None)
        self._review_links()
        while held:
            held.popleft()()

    def connections(self, a: str, b: str) -> list[Connection]:
        """Names of the connections between two hosts, oldest first."""
        return [link.name for link in self._links.values() if {a, b} == {link.up.source, link.up.target}]

    def cut(self, connection: Connection) -> bool:
        """Break a connection as a reset would: both sides hear it at once, what was under way is lost.

        The dialer dials again. False: there is no such connection.
        """
        link = self._links.get(connection)
        if link is None:
            return False
        link.abort()
        return True

    def close(self) -> None:
        """Close all endpoints. Idempotent."""
        endpoints: list[MemoryDialer | MemoryAcceptor] = [*self._dialers, *self._acceptors.values()]
        for endpoint in endpoints:
            endpoint.close()

    def _is_open(self, source: str, target: str) -> bool:
        return (source, target) not in self._blocked

    def _is_silent(self, link: Link) -> bool:
        a, b = link.up.source, link.up.target
        open_both = self._is_open(a, b) and self._is_open(b, a)
        return not open_both or a in self._frozen or b in self._frozen

    def _review_links(self) -> None:
        for link in tuple(self._links.values()):
            link.review(is_silent=self._is_silent(link))

    def _on_host(self, host: str, action: Callable[[], None]) -> None:
        """Do it now, or when the host thaws."""
        held = self._frozen.get(host)
        if held is None:
            action()
        else:
            held.append(action)

    def _connect(self, dialer: MemoryDialer) -> bool:
        """Try a handshake. False: try again later."""
        acceptor = self._acceptors.get(dialer.address)
        if acceptor is None:
            return False
        there, back = (dialer.host, acceptor.host), (acceptor.host, dialer.host)
        frozen = dialer.host in self._frozen or acceptor.host in self._frozen
        if frozen or not self._is_open(*there) or not self._is_open(*back):
            return False
        if not acceptor._allows(dialer.user_id):
            acceptor._refuse("the key is not allowed")
            dialer._refuse("the key is not allowed")
            return False
        self._num_links += 1
        name = b"\x00" + self._num_links.to_bytes(4, "big")
        self._links[name] = dialer._link = Link(self, name, dialer, acceptor)
        return True


class _Endpoint:
    """What acceptor and dialer share."""

    def __init__(self, network: MemoryNetwork, address: str, handler: TransportHandler, host: str) -> None:
        self.host = host
        self._network = network
        self._address = address
        self._handler = handler
        self._stats = TransportStats()
        self._closed = False

    @property
    def address(self) -> str:
        """Where peers dial, or what was dialed."""
        return self._address

    @property
    def stats(self) -> TransportStats:
        """Live counters; ``reasons`` counts refusals."""
        return self._stats

    def _refuse(self, reason: str) -> None:
        self._stats.refused += 1
        self._stats.reasons[reason] = self._stats.reasons.get(reason, 0) + 1

    def _send(self, lane: Lane | None, frames: Sequence[Buffer]) -> bool:
        message = isolated(frames)
        if lane is None or self._closed:
            self._stats.unsendable += not self._closed
            return False
        self._stats.sent_messages += 1
        self._stats.sent_bytes += sum(map(len, message))
        self._network._on_host(self.host, lambda: lane.carry(message))
        return True

    def _received(self, frames: Sequence[Buffer]) -> None:
        self._stats.received_messages += 1
        self._stats.received_bytes += sum(map(len, frames))


class MemoryAcceptor(_Endpoint):
    """The listening side; made by ``MemoryNetwork.acceptor``."""

    def __init__(
        self,
        network: MemoryNetwork,
        address: str,
        handler: TransportHandler,
        host: str,
        allow: Callable[[str], bool] | None,
    ) -> None:
        super().__init__(network, address, handler, host)
        self._allow = allow
        self._known: dict[Connection, Link] = {}

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Queue one message; see ``Transport.send``.

        Raises:
            UnsendableMessage: the message can be sent to nobody.
        """
        link = self._known.get(connection)
        return self._send(None if link is None else link.down, frames)

    def close(self) -> None:
        """Close now; the peers hear of it. Idempotent."""
        if not self._closed:
            self._closed = True
            del self._network._acceptors[self._address]
            for link in tuple(self._network._links.values()):
                if link.acceptor is self:
                    link.down.end()
            self._known.clear()

    def _allows(self, user_id: str) -> bool:
        return self._allow is None or self._allow(user_id)

    def _take(self, link: Link, frames: Sequence[Buffer]) -> None:
        if self._closed:
            return
        self._received(frames)
        if link.is_alive:
            self._known[link.name] = link
        if self._allows(link.dialer.user_id):
            self._handler.on_message(link.name, frames, link.dialer.user_id)
        else:
            self._refuse("a message under a key that is not allowed (any more)")

    def _lose(self, link: Link) -> None:
        if self._known.pop(link.name, None) is not None:
            self._handler.on_down(link.name)


class MemoryDialer(_Endpoint):
    """The calling side; made by ``MemoryNetwork.dialer``."""

    def __init__(
        self, network: MemoryNetwork, address: str, handler: TransportHandler, host: str, user_id: str
    ) -> None:
        super().__init__(network, address, handler, host)
        self.user_id = user_id
        self.last_refusal = ""
        """Why the last handshake was refused; ``""`` if none was."""
        self._link: Link | None = None
        self._up: Link | None = None
        self._pause_s = _RECONNECT_S[0]
        self._retry = network._loop.call_later(2 * network.latency_s, self._dial)

    @property
    def is_up(self) -> bool:
        """Whether there is a connection, as far as this side knows."""
        return self._up is not None

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """Queue one message; see ``Transport.send``. Nothing is queued for a later connection.

        Raises:
            UnsendableMessage: the message can be sent to nobody.
        """
        link = self._up if connection == DIALED else None
        return self._send(None if link is None else link.up, frames)

    def close(self) -> None:
        """Close now; the acceptor hears of it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._retry.cancel()
            del self._network._dialers[self]
            if self._link is not None:
                self._link.up.end()

    def _dial(self) -> None:
        if self._closed:
            return
        if self._network._connect(self):
            self._pause_s = _RECONNECT_S[0]
            link = self._link
            if link is not None:
                self._network._on_host(self.host, lambda: self._rise(link))
        else:
            self._redial()

    def _redial(self) -> None:
        self._retry.cancel()
        self._retry = self._network._loop.call_later(self._pause_s, self._dial)
        self._pause_s = min(2 * self._pause_s, _RECONNECT_S[1])

    def _rise(self, link: Link) -> None:
        if not self._closed and self._link is link:
            self._up = link
            self._handler.on_up(DIALED)

    def _refuse(self, reason: str) -> None:
        super()._refuse(reason)
        self.last_refusal = f"{self._address}: {reason}"

    def _take(self, link: Link, frames: Sequence[Buffer]) -> None:
        if not self._closed:
            self._received(frames)
            self._handler.on_message(DIALED, frames, "")

    def _lose(self, link: Link) -> None:
        if self._closed or self._link is not link:
            return
        self._link = None
        self._redial()
        if self._up is link:
            self._up = None
            self._handler.on_down(DIALED)
