"""Where engines run: the node and the devices of each part. Pure.

An engine whose devices lie on several nodes has a part on each, in the order of its ranks: SGLang starts one server per
node, and gives each as many ranks as every other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.backends.sglang_utils.server_arguments import BadEngineConfig, slots_of_engines
from miles_controller.placement import Placement, Slot


@dataclass(frozen=True, slots=True)
class Place:
    """Of a part of an engine.

    Attributes:
        node: By name; None: the first one.
        devices: GPUs, by index, in the order of ranks. Without meaning on a CPU.
    """

    node: str | None = None
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetPlaces:
    """All of a run's.

    Attributes:
        engines: The parts of each engine.
        head: The node of the router; None: the first one.
        on_one_node: Engines and trainer can share memory.
    """

    engines: tuple[tuple[Place, ...], ...]
    head: str | None = None
    on_one_node: bool = True

    @classmethod
    def anywhere(cls, num_engines: int) -> FleetPlaces:
        """On the first node, without devices."""
        return cls(((Place(),),) * num_engines)


def fleet_places(config: Mapping[str, Any], placement: Placement) -> FleetPlaces:
    """From a placement.

    Raises:
        BadEngineConfig: An engine would have unequal parts.
    """
    by_engine = slots_of_engines(config, placement.slots.get("engines", ()))
    engines = tuple(engine_parts(rank, slots) for rank, slots in enumerate(by_engine))
    return FleetPlaces(engines, placement.head, len(placement.nodes) <= 1)


def engine_parts(rank: int, slots: Sequence[Slot]) -> tuple[Place, ...]:
    """Of engine ``rank`` with these slots. Raises BadEngineConfig."""
    by_node: dict[str, list[int]] = {}
    for slot in slots:
        by_node.setdefault(slot.node, []).extend(slot.devices)
    if len({len(devices) for devices in by_node.values()}) > 1:
        shares = ", ".join(f"{len(devices)} on {node}" for node, devices in by_node.items())
        raise BadEngineConfig(
            f"engine {rank} cannot span its nodes",
            evidence=f"its devices: {shares}; SGLang gives each node as many ranks as every other",
            advice="Choose engines whose size divides, or is a multiple of, what a node has; see --sglang-config.",
        )
    return tuple(Place(node, tuple(devices)) for node, devices in by_node.items())
