"""Which port belongs to whom, as a state machine without I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from miles_agents.errors import InternalError


class NotLeased(InternalError):
    """A port was handed over or quarantined that is not leased here."""

    code = "E-PORT-004"


class PortTable:
    """Pure: each port is free, leased to one owner, or quarantined for good.

    Invariants: a port has at most one owner; a quarantined port is never offered again; free ports are offered in
    a ring from a moving point, so that a released port rests as long as possible (old peers may still knock).
    """

    def __init__(self, ports: Sequence[int], *, start: int = 0) -> None:
        """``start``: index of the first port to offer."""
        self._ports = tuple(ports)
        self._next = start % len(self._ports) if self._ports else 0
        self._owner: dict[int, str] = {}
        self._quarantined: set[int] = set()

    @property
    def quarantined(self) -> frozenset[int]:
        """Ports that are out of use."""
        return frozenset(self._quarantined)

    def holders(self) -> dict[str, int]:
        """How many ports each owner holds."""
        return dict(Counter(self._owner.values()))

    def owner_of(self, port: int) -> str | None:
        """Who leases ``port``."""
        return self._owner.get(port)

    def is_free(self, port: int) -> bool:
        """Neither leased nor quarantined."""
        return port not in self._owner and port not in self._quarantined

    def offers(self) -> Iterator[int]:
        """All free ports, once each, in ring order. The table must not change meanwhile."""
        ring = self._ports[self._next :] + self._ports[: self._next]
        return (port for port in ring if self.is_free(port))

    def lease(self, owner: str, ports: Sequence[int]) -> None:
        """Give free ``ports`` to ``owner``."""
        taken = [port for port in ports if not self.is_free(port)]
        if taken:
            raise NotLeased(f"ports {taken} are not free", evidence=f"asked for by {owner}", advice="Report this.")
        self._owner.update(dict.fromkeys(ports, owner))
        if ports:
            self._next = (self._ports.index(ports[-1]) + 1) % len(self._ports)

    def release(self, owner: str) -> list[int]:
        """Take back all ports of ``owner``, quarantined ones excepted. Returns them."""
        ports = [port for port, holder in self._owner.items() if holder == owner]
        for port in ports:
            del self._owner[port]
        return ports

    def quarantine(self, port: int) -> None:
        """A leased port turned out to be in use: nobody gets it any more, its owner loses it."""
        if port not in self._owner:
            raise NotLeased(f"port {port} is not leased", advice="Report this.")
        del self._owner[port]
        self._quarantined.add(port)
