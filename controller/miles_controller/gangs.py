"""Placements that are in use: who has which device, which spare nodes are kept, and where ranks go after a loss. Pure.

Consumes: meshes that join and leave a placement, nodes that are lost. Produces: what is used by whom, slots.
Invariants: the spare nodes of a placement are used for nothing else while a mesh of it lives; ranks that shared a node
before it was lost share one after it, whichever mesh asks first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from miles_agents.node_info import NodeInfo
from miles_controller.placement import (
    BadPlacementRequest,
    InfeasiblePlacement,
    Inventory,
    NodeDevices,
    Placement,
    Slot,
    replace,
)

Used: TypeAlias = dict[tuple[str, int], str]


@dataclass(slots=True)
class Gang:
    """The living meshes of one placement. ``original``: as it was given; ``current``: after all losses."""

    original: Placement
    current: Placement
    living: list[str] = field(default_factory=list)

    def uses(self, *, planned: bool = False) -> list[tuple[str, Slot]]:
        """The slots of its living meshes; ``planned``: also of those that have not been spawned."""
        names = self.current.slots if planned else self.living
        return [(name, slot) for name in names for parts in self.current.slots[name] for slot in parts]


class Gangs:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._gangs: list[Gang] = []

    def join(self, placement: Placement, name: str) -> Gang:
        """The mesh of that name lives, by this placement."""
        gang = self.find(placement)
        if gang is None:
            gang = Gang(placement, placement)
            self._gangs.append(gang)
        if name not in gang.current.slots:  # an earlier mesh of that name left
            gang.current = _with(gang.current, gang.original, name)
        gang.living.append(name)
        return gang

    def leave(self, gang: Gang, name: str) -> None:
        """It has ended; with the last mesh of a placement its spares are free."""
        if name in gang.living:
            gang.living.remove(name)
            gang.current = _without(gang.current, name)
        if not gang.living and gang in self._gangs:
            self._gangs.remove(gang)

    def find(self, placement: Placement) -> Gang | None:
        """Who lives by exactly this placement."""
        return next((gang for gang in self._gangs if gang.original is placement), None)

    def inventory(self, infos: Sequence[NodeInfo], *, without: Gang | None = None, keeps: bool = True) -> Inventory:
        """What there is, and what is used or kept by whom. ``without``: as if this gang kept no spares, and with
        ``keeps=False``, as if it used nothing either."""
        there = {info.node for info in infos}
        who: dict[tuple[str, int], dict[str, None]] = {}
        for gang in self._gangs:
            if gang is not without or keeps:
                for name, slot in gang.uses(planned=gang is without):
                    for device in slot.devices if slot.node in there else ():
                        who.setdefault((slot.node, device), {})[name] = None
            if gang is not without:
                label = f"spare of {'+'.join(gang.living)}"
                spares = set(gang.current.spares)
                for info in infos:
                    for device in info.devices if info.node in spares else ():
                        who.setdefault((info.node, device), {})[label] = None
        return Inventory.of(infos, used={key: "+".join(names) for key, names in who.items()})

    def move(self, gang: Gang, lost: str, kind: Literal["gpu", "cpu"] | None, infos: Iterable[NodeInfo]) -> None:
        """All ranks on a lost node move together: to a spare, else to free devices of one other node, of that kind.

        Raises:
            InfeasiblePlacement: nothing fits; they stay where they were.
        """
        fitting = [info for info in infos if kind in (None, info.device_kind)]
        kept = set(gang.current.spares)
        spares = [info for info in fitting if info.node in kept]
        try:
            gang.current = replace(gang.current, (lost,), self.inventory(spares, without=gang))
        except InfeasiblePlacement:
            inventory = self.inventory(fitting, without=gang)
            gang.current = replace(gang.current, (lost,), inventory, anywhere=True)


def check_placement(
    placement: Placement, name: str, num_ranks: int, inventory: Inventory, *, reserves_spares: bool
) -> None:
    """Whether a mesh can be spawned by a placement now. ``inventory``: without what others of the same placement use.

    Raises:
        BadPlacementRequest: It cannot; with all problems.
    """
    problems = _problems(placement, name, num_ranks, inventory)
    there = inventory.by_name()
    for spare in placement.spares if reserves_spares else ():
        node = there.get(spare)
        if node is not None and node.used:
            problems.append(f"spare node {spare} is taken by {_takers(node.used)}")
    if problems:
        raise BadPlacementRequest(
            f"mesh {name!r} cannot be spawned by this placement",
            evidence="\n".join(problems),
            advice="Place it anew, under this name and with this number of ranks, right before it is spawned.",
        )


def _problems(placement: Placement, name: str, num_ranks: int, inventory: Inventory) -> list[str]:
    if name not in placement.slots:
        return [f"the placement has no request {name!r}; it has {', '.join(placement.slots) or 'none'}"]
    ranks = placement.slots[name]
    there = inventory.by_name()
    problems = []
    if len(ranks) != num_ranks:
        problems.append(f"{len(ranks)} ranks were placed, the dimensions ask for {num_ranks}")
    shares = any(request.oversubscribe for request in placement.requests if request.name == name)
    for rank, parts in enumerate(ranks):
        if len(parts) != 1:
            problems.append(f"rank {rank} spans {', '.join(slot.node for slot in parts)}; an actor has one node")
        for slot in parts:
            problems += [
                f"rank {rank}: {problem}" for problem in _slot_problems(slot, there.get(slot.node), shares=shares)
            ]
    return problems


def _slot_problems(slot: Slot, node: NodeDevices | None, *, shares: bool) -> list[str]:
    if node is None:
        return [f"node {slot.node} is not there"]
    missing = [device for device in slot.devices if device not in node.healthy]
    taken = {device: node.used[device] for device in slot.devices if device in node.used}
    problems = [f"{slot.node} has no devices {missing}"] if missing else []
    if taken and not shares:
        problems.append(f"devices {sorted(taken)} of {slot.node} are taken by {_takers(taken)}")
    return problems


def _takers(used: Mapping[int, str]) -> str:
    return ", ".join(dict.fromkeys(used.values()))


def _without(placement: Placement, name: str) -> Placement:
    requests = tuple(request for request in placement.requests if request.name != name)
    slots = {other: ranks for other, ranks in placement.slots.items() if other != name}
    return dataclasses.replace(placement, requests=requests, slots=slots)


def _with(placement: Placement, original: Placement, name: str) -> Placement:
    requests = (*placement.requests, *(request for request in original.requests if request.name == name))
    return dataclasses.replace(placement, requests=requests, slots={**placement.slots, name: original.slots[name]})
