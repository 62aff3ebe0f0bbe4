"""What the hosts answered: the probe's plain values with types, and what only two hosts together show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict


class AboutHost(TypedDict):
    """Who answers."""

    hostname: str
    user: str
    uid: int
    python: str
    executable: str
    platform: str


class AboutPath(TypedDict):
    """A directory or file that the run names. ``nearest``: the directory that is there, itself or above it."""

    path: str
    exists: bool
    nearest: str
    content: str
    writable: bool
    free_bytes: int
    free_inodes: int


class GpuProcess(TypedDict):
    """A process that has memory of a GPU; without user and name where its pid leads to nobody."""

    pid: int
    user: str
    name: str
    bytes: int


class AboutGpu(TypedDict):
    """One GPU; total and free 0 where the driver does not say."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    processes: list[GpuProcess]


class AboutGpus(TypedDict):
    """All GPUs of a host, whoever may use them; no driver version where there is no driver."""

    driver: str
    gpus: list[AboutGpu]


class AboutMemory(TypedDict):
    """Bytes of the machine and of the cgroup's limit (-1: none); cores that a process may use."""

    memory_bytes: int
    available_bytes: int
    limit_bytes: int
    cores: int


class HostFacts(TypedDict, total=False):
    """``miles_agents.probe.facts``. What could not be found out is missing, and a line of ``faults``."""

    faults: dict[str, str]
    host: AboutHost
    packages: dict[str, str]
    paths: dict[str, AboutPath]
    ports: dict[str, bool]
    interfaces: dict[str, list[str]]
    reaches_by: str
    limits: dict[str, list[int]]
    cgroup: AboutMemory
    env: dict[str, str]
    code: str
    rdma: list[str]
    gpus: AboutGpus


@dataclass(frozen=True)
class HostReport:
    """One host. ``error``: why it has no facts. ``clock_s``: its clock minus ours, give or take ``clock_error_s``."""

    name: str
    facts: HostFacts | None = None
    error: str = ""
    clock_s: float = 0.0
    clock_error_s: float = 0.0


@dataclass(frozen=True)
class Link:
    """A connection that was tried. ``purpose``: who would use the address. ``problem`` empty: it works."""

    source: str
    target: str
    purpose: str
    address: str
    problem: str = ""


@dataclass(frozen=True)
class Examined:
    """All that was found out.

    Attributes:
        hosts: In the order in which they were named.
        unshared: By label of a path: the hosts that do not see what another one wrote there, and why.
        links: All connections that were tried.
    """

    hosts: tuple[HostReport, ...]
    unshared: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    links: tuple[Link, ...] = ()

    @property
    def answered(self) -> list[tuple[str, HostFacts]]:
        """Name and facts of those that have any."""
        return [(host.name, host.facts) for host in self.hosts if host.facts is not None]
