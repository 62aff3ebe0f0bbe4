"""What a node offers: the inventory values that an agent reports and the controller places by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from miles_agents.errors import PeerFault

_T = TypeVar("_T", int, str)

ADDRESS_VARIABLE = "MILES_NODE_ADDRESS"
"""Set in everything that runs on a node of a run of several machines: where the others reach what listens there."""
MAX_CPU_SLOTS = 4096
MAX_GPUS = 64
MAX_ADDRESSES = 64
MAX_INDEX = 4095
MAX_STRING = 256
MAX_NUMBER = 2**62
"""What a description may hold at most: placements go through all devices of all nodes."""


class BadNodeInfo(PeerFault):
    """A node described itself in a way that makes no sense."""

    code = "E-NODE-001"


def default_cpu_slots(cores: int) -> int:
    """CPU slots that a node without GPUs offers unless told otherwise: ``max(8, cores)``."""
    return max(8, cores)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver lists it.

    Attributes:
        index: The driver's index on this node (not a position in ``CUDA_VISIBLE_DEVICES``).
        uuid: The driver's UUID, which survives a change of order.
        memory_bytes: Total memory.
        numa_node: The NUMA node it hangs on, None where unknown.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    numa_node: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """The value as a dict of plain values."""
        return {
            "index": self.index,
            "uuid": self.uuid,
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "numa_node": self.numa_node,
        }

    @classmethod
    def from_plain(cls, value: object) -> Gpu:
        """Inverse of `to_plain`. Raises `BadNodeInfo`."""
        fields = _mapping(value, "gpu")
        numa = fields.get("numa_node")
        return cls(
            index=_natural(fields, "index", MAX_INDEX),
            uuid=_field(fields, "uuid", str),
            name=_field(fields, "name", str),
            memory_bytes=_natural(fields, "memory_bytes"),
            numa_node=None if numa is None else _natural(fields, "numa_node"),
        )


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node as its agent sees it.

    Attributes:
        node: The name that the run uses for it.
        addresses: Addresses of the node on the cluster's network, the preferred one first.
        cpu_slots: Devices that it offers if it has no GPU (`default_cpu_slots`).
        cores: CPU cores that the agent may use (its affinity mask, not what the machine has).
        memory_bytes: RAM that the agent may use.
        python: Version of the interpreter, ``3.12.3``.
        platform: Kernel and architecture, ``Linux-6.8 x86_64``.
    """

    node: str
    hostname: str
    addresses: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    cpu_slots: int
    cores: int
    memory_bytes: int
    python: str
    platform: str

    @property
    def device_kind(self) -> Literal["gpu", "cpu"]:
        """What `devices` counts."""
        return "gpu" if self.gpus else "cpu"

    @property
    def devices(self) -> tuple[int, ...]:
        """Indices of the devices, ascending: GPUs, or CPU slots on a node that has none."""
        if self.gpus:
            return tuple(sorted(gpu.index for gpu in self.gpus))
        return tuple(range(self.cpu_slots))

    def to_plain(self) -> dict[str, Any]:
        """The value as a dict of plain values."""
        return {
            "node": self.node,
            "hostname": self.hostname,
            "addresses": list(self.addresses),
            "gpus": [gpu.to_plain() for gpu in self.gpus],
            "cpu_slots": self.cpu_slots,
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
            "python": self.python,
            "platform": self.platform,
        }

    @classmethod
    def from_plain(cls, value: object) -> NodeInfo:
        """Inverse of `to_plain`. Raises `BadNodeInfo` and says which field is wrong."""
        fields = _mapping(value, "node")
        addresses = _items(fields, "addresses", MAX_ADDRESSES)
        if not all(isinstance(address, str) and len(address) <= MAX_STRING for address in addresses):
            raise _bad("addresses", addresses, f"a list of strings of at most {MAX_STRING} characters")
        gpus = tuple(Gpu.from_plain(gpu) for gpu in _items(fields, "gpus", MAX_GPUS))
        if len({gpu.index for gpu in gpus}) != len(gpus):
            raise _bad("gpus", [gpu.index for gpu in gpus], "GPUs with different indices")
        node = _field(fields, "node", str)
        if not node:
            raise _bad("node", node, "a name")
        return cls(
            node=node,
            hostname=_field(fields, "hostname", str),
            addresses=tuple(addresses),
            gpus=gpus,
            cpu_slots=_natural(fields, "cpu_slots", MAX_CPU_SLOTS),
            cores=_natural(fields, "cores"),
            memory_bytes=_natural(fields, "memory_bytes"),
            python=_field(fields, "python", str),
            platform=_field(fields, "platform", str),
        )


def _bad(field: str, value: object, wanted: str) -> BadNodeInfo:
    return BadNodeInfo(
        f"a node described itself with a bad field {field!r}",
        evidence=f"{field} = {value!r:.200}, wanted {wanted}",
        advice="Run the same version of the agent on all nodes.",
        field=field,
    )


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(what, value, "a mapping")
    return value


def _field(fields: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = fields.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(key, value, kind.__name__)
    if isinstance(value, str) and len(value) > MAX_STRING:
        raise _bad(key, value, f"at most {MAX_STRING} characters")
    return value


def _natural(fields: Mapping[str, Any], key: str, most: int = MAX_NUMBER) -> int:
    value = _field(fields, key, int)
    if not 0 <= value <= most:
        raise _bad(key, value, f"0 to {most}")
    return value


def _items(fields: Mapping[str, Any], key: str, most: int) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list | tuple):
        raise _bad(key, value, "a list")
    if len(value) > most:
        raise _bad(key, f"a list of {len(value)}", f"at most {most}")
    return list(value)
