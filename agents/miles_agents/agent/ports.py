"""Leases of TCP ports: who on this host may listen where, without guessing.

Three guards, each against another danger: the table (pure) keeps the tenants of one agent apart; a locked file per
port keeps agents of the same user apart, and dies with its holder; a bound socket, kept until just before the
tenant starts, keeps everybody else away. Ports come from below the range that the kernel hands out for outgoing
connections, so that no client takes them in the short time between ``hand_over`` and the tenant's own bind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from miles_agents.agent.port_table import NotLeased, PortTable
from miles_agents.errors import ConfigError, EnvironmentFault

__all__ = [
    "NoFreePort",
    "NoUsableRange",
    "NotLeased",
    "PortLeases",
    "PortTable",
    "UnknownInterface",
    "UnsafeLockDirectory",
    "bind_everywhere",
    "read_local_port_range",
]

DEFAULT_PORTS = range(20000, 30000)
LOCAL_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class NoFreePort(EnvironmentFault):
    """All ports of the range are leased, locked by other agents, in use, or quarantined."""

    code = "E-PORT-001"


class NoUsableRange(ConfigError):
    """The range lies within the kernel's range for outgoing connections, or is no range of ports."""

    code = "E-PORT-002"


class UnsafeLockDirectory(EnvironmentFault):
    """The directory of the lock files cannot be used, or others could write into it."""

    code = "E-PORT-003"


class UnknownInterface(EnvironmentFault):
    """The address to listen on is none of this host's."""

    code = "E-PORT-005"


@dataclass(slots=True)
class _Hold:
    """What keeps others off one port: the lock always, the sockets until ``hand_over``."""

    lock: int
    probes: list[socket.socket] = field(default_factory=list)

    def unbind(self) -> None:
        while self.probes:
            self.probes.pop().close()

    def close(self) -> None:
        self.unbind()
        os.close(self.lock)


class PortLeases:
    """Leases for the tenants of one agent. Not thread-safe; no call blocks.

    Args:
        ports: The range. What of it reaches into the kernel's range for outgoing connections is left out
            (``excluded``).
        rng: Chooses where in the range this agent begins, so that several agents rarely meet.
        interface: An address of this host that ports must also be free on; wildcards are always tried.
        lock_dir: Shared by all agents of this user on this host; made with mode 0700.
        local_port_range: First and last port of the kernel's range; read from /proc by default.
    """

    def __init__(
        self,
        ports: range = DEFAULT_PORTS,
        *,
        rng: random.Random | None = None,
        interface: str | None = None,
        lock_dir: Path | None = None,
        local_port_range: tuple[int, int] | None = None,
    ) -> None:
        first, last = local_port_range or read_local_port_range()
        usable = [port for port in ports if not first <= port <= last]
        self.excluded = len(ports) - len(usable)
        if not usable or not 0 < min(usable) <= max(usable) < 65536:
            raise NoUsableRange(
                f"ports {_range_text(ports)} cannot be leased",
                evidence=f"the kernel hands out {first}-{last} for outgoing connections ({LOCAL_PORT_RANGE})",
                advice=f"Choose a range of ports between 1024 and 65535 outside {first}-{last}.",
            )
        self._range_text = _range_text(ports)
        self._interface = interface
        _check_interface(interface)
        self._lock_dir = _open_lock_dir(lock_dir or Path(f"/tmp/miles-ports-{os.getuid()}"))  # noqa: S108
        start = (rng or random.Random()).randrange(len(usable))  # noqa: S311  # spreads, does not protect
        self._table = PortTable(usable, start=start)
        self._holds: dict[int, _Hold] = {}

    @property
    def table(self) -> PortTable:
        """Who holds what. For status pages; do not change it."""
        return self._table

    def lease(self, owner: str, count: int, *, consecutive: bool = False) -> list[int]:
        """``count`` ports for ``owner``, in addition to those that it has.

        Args:
            owner: Any name, shown to people when ports run out.
            count: How many.
            consecutive: Whether they must follow on each other.

        Raises:
            NoFreePort: Not enough ports; nothing is leased then.
        """
        held: dict[int, _Hold] = {}
        refused: dict[int, str] = {}
        try:
            # Twice round for a run of ports that lies across the point where the ring begins.
            for port in chain(self._table.offers(), self._table.offers() if consecutive else ()):
                if len(held) >= count:
                    break
                hold = self._hold(port, refused)
                if consecutive and (hold is None or port - 1 not in held):
                    self._drop(held)
                if hold is not None:
                    held[port] = hold
            if len(held) < count:
                raise self._exhausted(owner, count, refused, consecutive=consecutive)
            self._table.lease(owner, list(held))
        except BaseException:
            self._drop(held)
            raise
        self._holds |= held
        return list(held)

    def hand_over(self, ports: Iterable[int]) -> None:
        """Unbind the ports, for their tenant to bind them: call it just before the tenant starts."""
        for port in self._checked(ports):
            self._holds[port].unbind()

    def release(self, owner: str) -> None:
        """The owner is gone: its ports are free again."""
        for port in self._table.release(owner):
            self._holds.pop(port).close()

    def quarantine(self, port: int) -> None:
        """The tenant found its leased port in use: it is not leased again by this agent."""
        self._table.quarantine(port)
        self._holds.pop(port).close()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for hold in self._holds.values():
            hold.close()
        for owner in self._table.holders():
            self._table.release(owner)
        self._holds.clear()

    def _checked(self, ports: Iterable[int]) -> list[int]:
        ports = list(ports)
        unknown = [port for port in ports if port not in self._holds]
        if unknown:
            raise NotLeased(f"ports {unknown} are not leased", advice="Report this.")
        return ports

    def _hold(self, port: int, refused: dict[int, str]) -> _Hold | None:
        lock = _lock(self._lock_dir / str(port))
        if lock is None:
            refused[port] = "locked by other agents"
            return None
        hold = _Hold(lock)
        try:
            hold.probes = bind_everywhere(port, self._interface)
        except OSError as error:
            hold.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            refused[port] = "in use by other programs"
            return None
        return hold

    @staticmethod
    def _drop(held: dict[int, _Hold]) -> None:
        while held:
            held.popitem()[1].close()

    def _exhausted(self, owner: str, count: int, refused: dict[int, str], *, consecutive: bool) -> NoFreePort:
        holders = [f"{name}: {number}" for name, number in sorted(self._table.holders().items())]
        others = [f"{reason}: {number}" for reason, number in sorted(Counter(refused.values()).items())]
        if self._table.quarantined:
            others.append(f"quarantined after a collision: {len(self._table.quarantined)}")
        if self.excluded:
            others.append(f"excluded, the kernel uses them for outgoing connections: {self.excluded}")
        kind = "consecutive free ports" if consecutive else "free ports"
        return NoFreePort(
            f"no {count} {kind} in {self._range_text} for {owner}",
            evidence="; ".join([*holders, *others]),
            advice="Give the agent a larger range of ports, or end what holds them.",
            holders=self._table.holders(),
        )


def read_local_port_range(file: Path = LOCAL_PORT_RANGE) -> tuple[int, int]:
    """First and last port that the kernel hands out for outgoing connections; Linux's default if unreadable."""
    try:
        first, last = file.read_text().split()
    except (OSError, ValueError):
        return 32768, 60999
    return int(first), int(last)


def bind_everywhere(port: int, interface: str | None = None) -> list[socket.socket]:
    """Sockets that hold ``port`` on all addresses of this host (not listening; nobody can connect).

    Without SO_REUSEADDR the kernel refuses if anybody has the port on any address, also in TIME_WAIT. Raises
    ``OSError`` if so, or if ``interface`` is not an address of this host.
    """
    if interface is not None:
        with socket.socket(_family(interface), socket.SOCK_STREAM) as probe:
            probe.bind((interface, port))
    probes: list[socket.socket] = []
    try:
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
            bound = _bind(family, address, port)
            probes += [bound] if bound is not None else []
    except OSError:
        for probe in probes:
            probe.close()
        raise
    return probes


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _check_interface(address: str | None) -> None:
    if address is None:
        return
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise UnknownInterface(
            f"cannot listen on {address}",
            evidence=str(error),
            advice="Give an address of one of this host's interfaces (see: ip address).",
        ) from None


def _bind(family: socket.AddressFamily, address: str, port: int) -> socket.socket | None:
    """None: this host does not speak the family."""
    absent = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    try:
        probe = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in absent:
            return None
        raise
    try:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((address, port))
    except OSError as error:
        probe.close()
        if error.errno in absent:
            return None
        raise
    return probe


def _lock(path: Path) -> int | None:
    """The locked descriptor, or None if another process holds it. The file stays: removing it would race."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:  # a file system without locks
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # a cleaner of temporary files removed it in between: lock the new one


def _open_lock_dir(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = path.lstat()
    except OSError as error:
        raise UnsafeLockDirectory(
            f"cannot use {path} for the lock files of ports",
            evidence=str(error),
            advice="Make it a directory that this user can write, or choose another one.",
        ) from None
    if not path.is_dir() or path.is_symlink() or stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise UnsafeLockDirectory(
            f"{path} is not safe for the lock files of ports",
            evidence=f"owner {stat.st_uid}, mode {stat.st_mode & 0o7777:o}; wanted {os.getuid()}, 700",
            advice=f"Remove {path}, or give it to this user with mode 0700.",
        )
    return path


def _range_text(ports: range) -> str:
    return f"{ports[0]}-{ports[-1]}" if ports else "(an empty range)"
