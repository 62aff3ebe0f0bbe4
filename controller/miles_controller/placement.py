"""Gang placement: which rank runs on which devices of which node; all of it or nothing. Pure and deterministic.

Packing: nodes in the given order, devices in index order, one node filled before the next, a rank never straddles
nodes. Only a *service* that needs more devices than any node has (a tensor-parallel server over two machines) spans
nodes, and then whole ones. Requests are packed in the given order; if that fails, once more with the most constrained
first (few allowed nodes, then many devices per rank). That is no search: a contrived mix of sizes may fit and still
be refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from miles_agents.errors import ConfigError
from miles_agents.node_info import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Collection


class InfeasiblePlacement(ConfigError):
    """What was asked for does not fit on what there is."""

    code = "E-PLACE-001"


class BadPlacementRequest(ConfigError):
    """A placement was asked for that makes no sense on any cluster."""

    code = "E-PLACE-002"


@dataclass(frozen=True, slots=True)
class NodeDevices:
    """One node and the state of its devices. ``used``: device to the name of who has it."""

    info: NodeInfo
    used: Mapping[int, str] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """The node's name."""
        return self.info.node

    @property
    def healthy(self) -> tuple[int, ...]:
        """Devices that have not failed, ascending."""
        return tuple(device for device in self.info.devices if device not in self.failed)

    @property
    def free(self) -> tuple[int, ...]:
        """Healthy devices that nobody has, ascending."""
        return tuple(device for device in self.healthy if device not in self.used)

    @property
    def wholly_free(self) -> bool:
        """Whether nothing is used and nothing failed."""
        return self.free == self.info.devices


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is: nodes in the order in which they are to be filled."""

    nodes: tuple[NodeDevices, ...]

    @classmethod
    def of(
        cls,
        infos: Iterable[NodeInfo],
        *,
        used: Mapping[tuple[str, int], str] | None = None,
        failed: Collection[tuple[str, int]] = (),
    ) -> Inventory:
        """From what nodes report, with ``(node, device)`` keys for what is used (by whom) and failed."""
        users = _by_node(used or {})
        broken: dict[str, set[int]] = {}
        for node, device in failed:
            broken.setdefault(node, set()).add(device)
        return cls(
            tuple(NodeDevices(info, users.get(info.node, {}), frozenset(broken.get(info.node, ()))) for info in infos)
        )

    def get(self, name: str) -> NodeDevices | None:
        """The node of this name, or None."""
        return next((node for node in self.nodes if node.name == name), None)

    def with_used(self, used: Mapping[tuple[str, int], str]) -> Inventory:
        """The same with more devices used, such as `Placement.used`."""
        more = _by_node(used)
        return Inventory(
            tuple(dataclasses.replace(node, used={**node.used, **more.get(node.name, {})}) for node in self.nodes)
        )

    def by_name(self) -> dict[str, NodeDevices]:
        """All nodes in order, for many questions."""
        return {node.name: node for node in self.nodes}


def _by_node(used: Mapping[tuple[str, int], str]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for (node, device), who in used.items():
        found.setdefault(node, {})[device] = who
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """A gang of ranks that is placed as a whole.

    Attributes:
        devices_per_rank: 0 for a rank without devices; it goes to the head node.
        colocate_with: Share the devices of that request: rank j covers its devices j*k to j*k+k-1 in rank order.
        kind: Only a ``service`` may span nodes.
        max_ranks_per_node: No more ranks of this request on one node.
        ranks_per_node: Exactly so many ranks of this request on each node that it uses.
        nodes: Only these nodes.
        device_kind: Only nodes that offer this kind; None: any.
        oversubscribe: Let ranks share devices, also such as others use, where there are too few.
    """

    name: str
    num_ranks: int
    devices_per_rank: int = 1
    colocate_with: str | None = None
    kind: Literal["ranks", "service"] = "ranks"
    max_ranks_per_node: int | None = None
    ranks_per_node: int | None = None
    nodes: tuple[str, ...] | None = None
    device_kind: Literal["gpu", "cpu"] | None = None
    oversubscribe: bool = False

    def allows(self, info: NodeInfo) -> bool:
        """Whether it may use this node."""
        return (self.nodes is None or info.node in self.nodes) and self.device_kind in (None, info.device_kind)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a rank runs. A rank that spans nodes has one on each.

    Attributes:
        devices: Device indices on the node, ascending.
        local_rank: Position among the ranks of the same request on this node.
        node_rank: Position of the node among the nodes of the same request.
    """

    node: str
    devices: tuple[int, ...]
    local_rank: int
    node_rank: int


Slots: TypeAlias = tuple[tuple[Slot, ...], ...]
"""By rank, then by node."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The answer: where each rank of each request runs.

    Attributes:
        slots: By the name of the request.
        head: The first node that is used; ranks without devices are there.
        spares: Nodes kept free, in inventory order.
        shared: Names of the requests that had to share devices because they may oversubscribe.
    """

    requests: tuple[Request, ...]
    slots: Mapping[str, Slots]
    head: str
    spares: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def items(self) -> Iterator[tuple[str, int, Slot]]:
        """All slots with request and rank, in order."""
        for request in self.requests:
            for rank, slots in enumerate(self.slots[request.name]):
                for slot in slots:
                    yield request.name, rank, slot

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes in use, in order of their first use."""
        return tuple(dict.fromkeys(slot.node for _, _, slot in self.items()))

    def ranks_on(self, node: str) -> tuple[tuple[str, int], ...]:
        """Requests and ranks that are, also in part, on this node."""
        return tuple((name, rank) for name, rank, slot in self.items() if slot.node == node)

    def used(self) -> dict[tuple[str, int], str]:
        """Who has each device: ``(node, device)`` to the names of the requests, joined by ``+``."""
        names: dict[tuple[str, int], dict[str, None]] = {}
        for name, _, slot in self.items():
            for device in slot.devices:
                names.setdefault((slot.node, device), {})[name] = None
        return {key: "+".join(who) for key, who in names.items()}


def place(inventory: Inventory, requests: Sequence[Request], *, num_spares: int = 0) -> Placement:
    """Place all requests, keeping ``num_spares`` whole nodes free (taken from the end).

    Raises:
        BadPlacementRequest: The requests contradict themselves; with all problems.
        InfeasiblePlacement: They do not fit; with all problems and tables of what there is and what was asked.
    """
    from miles_controller.placement_packer import Packer, request_problems

    problems = request_problems(inventory, requests, num_spares)
    if problems:
        raise BadPlacementRequest(
            "the placement that was asked for makes no sense",
            evidence="\n".join(problems),
            advice="Correct the requests above.",
        )
    free_nodes = [node.name for node in inventory.nodes if node.wholly_free]
    spares = tuple(free_nodes[len(free_nodes) - num_spares :]) if num_spares <= len(free_nodes) else ()
    first = packer = Packer(inventory, requests, spares)
    packer.pack(requests)
    if packer.problems:
        packer = Packer(inventory, requests, spares)
        packer.pack(sorted(requests, key=lambda request: (_breadth(inventory, request), -request.devices_per_rank)))
    problems = first.problems if packer.problems else []
    if num_spares > len(free_nodes):
        problems.append(f"{num_spares} spare nodes asked, {len(free_nodes)} nodes are wholly free")
    if problems:
        raise _infeasible("the requests do not fit on the nodes", problems, first.after, requests, spares)
    return packer.placement()


def replace(
    placement: Placement, lost_nodes: Collection[str], inventory: Inventory, *, anywhere: bool = False
) -> Placement:
    """Move the ranks of lost nodes to spare nodes, one spare for each lost node; all others stay where they are.

    Args:
        inventory: The state now; spares must be in it.
        anywhere: Not only spare nodes may be used, but all that have room.

    Raises:
        InfeasiblePlacement: There are too few nodes that fit.
    """
    there, plan = inventory.by_name(), _ByNode(placement)
    names = list(there) if anywhere else placement.spares
    spares = [there[name] for name in names if name not in lost_nodes and name in there]
    lost = [node for node in placement.nodes if node in lost_nodes]
    match = _match({node: [spare.name for spare in spares if _fits(plan, node, spare)] for node in lost})
    if len(match) < len(lost):
        needs = [
            f"{node} is lost with {len(plan.devices(node))} devices in use by {', '.join(plan.names(node))}"
            for node in lost
        ]
        which = "nodes" if anywhere else "spare nodes"
        short = f"{len(lost)} nodes to replace, {len(match)} of {len(spares)} {which} fit"
        problems = [short, *needs]
        raise _infeasible("lost nodes cannot be replaced", problems, inventory, placement.requests, placement.spares)
    devices = {
        node: dict(zip(plan.devices(node), _offered(plan, node, there[spare]), strict=False))
        for node, spare in match.items()
    }

    def moved(name: str, slot: Slot) -> Slot:
        if slot.node not in match:
            return slot
        spare = match[slot.node]
        taken = tuple(sorted(devices[slot.node][device] for device in slot.devices))
        others = plan.slots(name, spare)
        node_rank = others[0].node_rank if others else slot.node_rank
        return Slot(spare, taken, slot.local_rank + len(others), node_rank)

    return dataclasses.replace(
        placement,
        slots={
            name: tuple(tuple(moved(name, slot) for slot in slots) for slots in ranks)
            for name, ranks in placement.slots.items()
        },
        head=match.get(placement.head, placement.head),
        spares=tuple(name for name in placement.spares if name not in lost_nodes and name not in match.values()),
    )


class _ByNode:
    """The slots of a placement by node: looked through once, and not for each pair of nodes."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._on: dict[str, list[tuple[str, int, Slot]]] = {}
        for name, rank, slot in placement.items():
            self._on.setdefault(slot.node, []).append((name, rank, slot))

    def devices(self, node: str) -> tuple[int, ...]:
        """All that are in use there, ascending."""
        return tuple(sorted({device for _, _, slot in self._on.get(node, ()) for device in slot.devices}))

    def names(self, node: str) -> list[str]:
        """The requests that have something there, in order."""
        return list(dict.fromkeys(name for name, _, _ in self._on.get(node, ())))

    def slots(self, name: str, node: str) -> list[Slot]:
        """Those of one request there."""
        return [slot for other, _, slot in self._on.get(node, ()) if other == name]

    def spans(self, node: str) -> bool:
        """Whether a rank that is there is on other nodes, too."""
        slots = self.placement.slots
        return any(len(slots[name][rank]) > 1 for name, rank, _ in self._on.get(node, ()))


def _breadth(inventory: Inventory, request: Request) -> int:
    return sum(request.allows(node.info) for node in inventory.nodes)


def _offered(plan: _ByNode, lost: str, spare: NodeDevices) -> tuple[int, ...]:
    """Devices that the ranks of a lost node may take: free ones first, then others if all of them may share."""
    names = plan.names(lost)
    share = all(request.oversubscribe for request in plan.placement.requests if request.name in names)
    return spare.free + (tuple(device for device in spare.healthy if device in spare.used) if share else ())


def _crowds(plan: _ByNode, request: Request, lost: str, spare: str) -> bool:
    """Whether the ranks of a lost node would be too many with those that are on the spare node already."""
    counts = [len(plan.slots(request.name, node)) for node in (lost, spare)]
    if counts[0] and counts[1] and request.ranks_per_node is not None:
        return True
    return request.max_ranks_per_node is not None and sum(counts) > request.max_ranks_per_node


def _fits(plan: _ByNode, lost: str, spare: NodeDevices) -> bool:
    need = len(plan.devices(lost))
    names = plan.names(lost)
    if plan.spans(lost) and not (spare.wholly_free and len(spare.free) == need):
        return False
    allowed = all(
        request.allows(spare.info) and not _crowds(plan, request, lost, spare.name)
        for request in plan.placement.requests
        if request.name in names
    )
    return allowed and len(_offered(plan, lost, spare)) >= need


def _match(options: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A largest matching of keys to options (augmenting paths), the first options preferred."""
    owner: dict[str, str] = {}

    def assign(key: str, seen: set[str]) -> bool:
        for option in options[key]:
            if option not in seen:
                seen.add(option)
                if option not in owner or assign(owner[option], seen):
                    owner[option] = key
                    return True
        return False

    for key in options:
        assign(key, set())
    found = {key: option for option, key in owner.items()}
    return {key: found[key] for key in options if key in found}


def _infeasible(
    what: str, problems: Sequence[str], inventory: Inventory, requests: Sequence[Request], spares: Sequence[str]
) -> InfeasiblePlacement:
    from miles_controller.placement_table import render_inventory, render_requests

    tables = f"{render_inventory(inventory, spares)}\n{render_requests(requests)}"
    return InfeasiblePlacement(
        what,
        evidence="\n".join([*problems, "", tables]),
        advice="Ask for fewer ranks or devices per rank, add nodes, or end what holds the devices.",
        problems=list(problems),
    )
