"""The packing itself, one attempt in one order; used by `miles_controller.placement.place` only. Pure."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from miles_controller.placement import Inventory, NodeDevices, Placement, Request, Slot, Slots

Parts: TypeAlias = list[tuple[str, tuple[int, ...]]]
"""Node and devices, for one rank."""


def request_problems(inventory: Inventory, requests: Sequence[Request], num_spares: int) -> list[str]:
    """Everything that is wrong with the requests by themselves."""
    names = [request.name for request in requests]
    problems = [f"{name} is asked for twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if num_spares < 0:
        problems.append(f"num_spares={num_spares} is below 0")
    if not requests:
        problems.append("nothing is asked for")
    known = [node.name for node in inventory.nodes]
    there = set(known)
    problems += [f"node {name} is listed twice" for name, count in sorted(Counter(known).items()) if count > 1]
    for request in requests:
        for key, value, least in (
            ("num_ranks", request.num_ranks, 1),
            ("devices_per_rank", request.devices_per_rank, 0),
            ("max_ranks_per_node", request.max_ranks_per_node, 1),
            ("ranks_per_node", request.ranks_per_node, 1),
        ):
            if value is not None and value < least:
                problems.append(f"{request.name}: {key}={value} is below {least}")
        if request.ranks_per_node and request.num_ranks % request.ranks_per_node:
            problems.append(f"{request.name}: {request.num_ranks} ranks are no multiple of {request.ranks_per_node}")
        for node in request.nodes or ():
            if node not in there:
                problems.append(f"{request.name}: no node is called {node!r}{_nearest(node, known)}")
        base = request.colocate_with
        if base is not None and base not in names:
            problems.append(f"{request.name}: colocate_with={base!r} is not asked for{_nearest(base, names)}")
    bases = {request.name: request.colocate_with for request in requests}
    return problems + [f"{name}: colocate_with leads back to itself" for name in names if _leads_back(bases, name)]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _leads_back(bases: dict[str, str | None], name: str) -> bool:
    seen: set[str] = set()
    base = bases.get(name)
    while base is not None and base not in seen:
        seen.add(base)
        base = bases.get(base)
    return name in seen


class Packer:
    """One attempt. Collects all problems: a request that does not fit takes nothing."""

    def __init__(self, inventory: Inventory, requests: Sequence[Request], spares: Sequence[str]) -> None:
        self.problems: list[str] = []
        self._inventory = inventory
        self._requests = tuple(requests)
        self._spares = tuple(spares)
        self._nodes = [node for node in inventory.nodes if node.name not in spares]
        self._slots: dict[str, Slots] = {}
        self._shared: set[str] = set()
        self._taken: dict[tuple[str, int], str] = {}

    @property
    def after(self) -> Inventory:
        """The inventory with what was placed so far."""
        return self._inventory.with_used(self._taken)

    def placement(self) -> Placement:
        """The result; meaningful without problems only."""
        shared = tuple(request.name for request in self._requests if request.name in self._shared)
        return Placement(self._requests, self._slots, self._head(), self._spares, shared)

    def pack(self, order: Sequence[Request]) -> None:
        """Place the requests: first those with devices of their own, then those without, then those that share."""
        own = [request for request in order if request.colocate_with is None]
        for request in own:
            if request.devices_per_rank > 0:
                self._place(request)
        for request in own:
            if request.devices_per_rank == 0:
                self._place_without_devices(request)
        waiting = [request for request in order if request.colocate_with is not None]
        while waiting:
            request = next(one for one in waiting if one.colocate_with not in {other.name for other in waiting})
            waiting.remove(request)
            if request.colocate_with in self._slots:
                self._colocate(request, self._slots[request.colocate_with])
            else:
                self.problems.append(f"{request.name}: shares the devices of {request.colocate_with}, which has none")

    def _head(self) -> str:
        used = {slot.node for ranks in self._slots.values() for slots in ranks for slot in slots}
        return next((node.name for node in self._nodes if node.name in used), "")

    def _allowed(self, request: Request) -> list[NodeDevices]:
        return [node for node in self._nodes if request.allows(node.info)]

    def _free(self, node: NodeDevices) -> tuple[int, ...]:
        return tuple(device for device in node.free if (node.name, device) not in self._taken)

    def _place(self, request: Request) -> None:
        allowed = self._allowed(request)
        largest = max((len(node.info.devices) for node in allowed), default=0)
        if request.kind == "service" and allowed and request.devices_per_rank > largest:
            self._place_spanning(request, allowed)
            return
        counts = self._counts(request, allowed)
        if sum(counts) < request.num_ranks:
            self.problems.append(self._shortage(request, allowed, sum(counts)))
            return
        ranks: list[Parts] = []
        for node, count in zip(allowed, counts, strict=True):
            ranks += [[(node.name, devices)] for devices in itertools.islice(self._chunks(request, node), count)]
        self._accept(request, ranks)

    def _counts(self, request: Request, allowed: Sequence[NodeDevices]) -> list[int]:
        """Ranks for each node; their sum falls short where there is no room."""
        size, missing = request.devices_per_rank, request.num_ranks
        if request.ranks_per_node is not None:
            return self._slice_counts(request, allowed, request.ranks_per_node)
        limit = request.max_ranks_per_node or missing
        counts = []
        for node in allowed:
            counts.append(min(len(self._free(node)) // size, limit, missing))
            missing -= counts[-1]
        if missing and request.oversubscribe:
            self._shared.add(request.name)
        while missing and request.oversubscribe:
            before = missing
            for index, node in enumerate(allowed):
                more = min(len(node.healthy) // size, limit - counts[index], missing)
                counts[index] += more
                missing -= more
            if missing == before:
                break
        return counts

    def _slice_counts(self, request: Request, allowed: Sequence[NodeDevices], per_node: int) -> list[int]:
        """As many ranks on each node as a slice has, or none."""
        size, missing = request.devices_per_rank, request.num_ranks
        counts = [0] * len(allowed)
        for shares in (False, True) if request.oversubscribe else (False,):
            for index, node in enumerate(allowed):
                room = len(node.healthy) // size * per_node if shares else len(self._free(node)) // size
                if missing and not counts[index] and room >= per_node:
                    counts[index] = per_node
                    missing -= per_node
                    if shares:
                        self._shared.add(request.name)
        return counts

    def _chunks(self, request: Request, node: NodeDevices) -> Iterator[tuple[int, ...]]:
        """Devices for one rank after the other: free ones first, then all healthy ones round and round."""
        size = request.devices_per_rank
        free = self._free(node)
        yield from (free[start : start + size] for start in range(0, len(free) // size * size, size))
        healthy = node.healthy
        while request.oversubscribe:
            yield from (healthy[start : start + size] for start in range(0, len(healthy) // size * size, size))

    def _place_spanning(self, request: Request, allowed: Sequence[NodeDevices]) -> None:
        size = request.devices_per_rank
        whole = [node for node in allowed if node.wholly_free and len(self._free(node)) == len(node.free) > 0]
        sizes = dict.fromkeys(len(node.free) for node in whole if size % len(node.free) == 0)
        ranks: list[Parts] = []
        for node_size in sizes:
            fitting = [node for node in whole if len(node.free) == node_size]
            step = size // node_size
            ranks += [
                [(node.name, node.free) for node in fitting[start : start + step]]
                for start in range(0, len(fitting) // step * step, step)
            ]
        if len(ranks) >= request.num_ranks:
            self._accept(request, ranks[: request.num_ranks])
            return
        found = sorted({len(node.info.devices) for node in allowed})
        problem = self._shortage(request, allowed, len(ranks))
        if not any(devices and size % devices == 0 for devices in found):
            problem += f"; to span nodes, {size} must be a multiple of a node's devices ({', '.join(map(str, found))})"
        self.problems.append(f"{problem}; it spans nodes, which must be wholly free: {len(whole)} are")

    def _place_without_devices(self, request: Request) -> None:
        used = {node for node, _ in self._taken}
        nodes = sorted(self._allowed(request), key=lambda node: node.name not in used)
        limit = request.ranks_per_node or request.max_ranks_per_node or request.num_ranks
        places = [node.name for node in nodes for _ in range(limit)][: request.num_ranks]
        if len(places) < request.num_ranks:
            self.problems.append(
                f"{request.name}: {request.num_ranks} ranks asked, room for {len(places)} "
                f"({len(nodes)} nodes, at most {limit} ranks on each)"
            )
            return
        self._accept(request, [[(node, ())] for node in places])

    def _colocate(self, request: Request, base: Slots) -> None:
        size, label = request.devices_per_rank, f"{request.name} on {request.colocate_with}"
        flat = [(slot.node, device) for slots in base for slot in slots for device in slot.devices]
        if size == 0:
            if request.num_ranks > len(base):
                self.problems.append(f"{label}: {request.num_ranks} ranks asked, {len(base)} to share with")
                return
            self._accept(request, [[(slots[0].node, ())] for slots in base[: request.num_ranks]])
            return
        asked = request.num_ranks * size
        if asked > len(flat):
            self.problems.append(f"{label}: {asked} devices asked, {len(flat)} to share")
            return
        ranks: list[Parts] = []
        for start in range(0, asked, size):
            parts: dict[str, list[int]] = {}
            for node, device in flat[start : start + size]:
                parts.setdefault(node, []).append(device)
            ranks.append([(node, tuple(sorted(set(devices)))) for node, devices in parts.items()])
        problems = self._colocation_problems(request, label, ranks)
        self.problems += problems
        if not problems:
            self._accept(request, ranks)

    def _colocation_problems(self, request: Request, label: str, ranks: Sequence[Parts]) -> list[str]:
        problems = []
        by_name = {node.name: node for node in self._nodes}
        for rank, parts in enumerate(ranks):
            names = " and ".join(name for name, _ in parts)
            whole = all(devices == by_name[name].info.devices for name, devices in parts)
            if len(parts) > 1 and request.kind != "service":
                problems.append(f"{label}: the devices of rank {rank} lie on {names}; a rank cannot straddle nodes")
            elif len(parts) > 1 and not whole:
                problems.append(f"{label}: rank {rank} would cover parts of {names}; it must cover whole nodes")
            outside = [name for name, _ in parts if not request.allows(by_name[name].info)]
            if outside:
                problems.append(f"{label}: rank {rank} would be on {', '.join(outside)}, which it may not use")
        limit = request.max_ranks_per_node
        per_node = Counter(name for parts in ranks for name, _ in parts)
        exactly = request.ranks_per_node
        problems += [
            f"{label}: {count} ranks on {name}, exactly {exactly} are asked for"
            for name, count in per_node.items()
            if exactly is not None and count != exactly
        ]
        return problems + [
            f"{label}: {count} ranks on {name}, at most {limit} are allowed"
            for name, count in per_node.items()
            if limit is not None and count > limit
        ]

    def _accept(self, request: Request, ranks: Sequence[Parts]) -> None:
        on_node: dict[str, int] = {}
        node_ranks: dict[str, int] = {}
        slots = []
        for parts in ranks:
            mine = []
            for name, devices in parts:
                node_rank = node_ranks.setdefault(name, len(node_ranks))
                mine.append(Slot(name, devices, on_node.get(name, 0), node_rank))
                on_node[name] = on_node.get(name, 0) + 1
                for device in devices:
                    self._taken.setdefault((name, device), request.name)
            slots.append(tuple(mine))
        self._slots[request.name] = tuple(slots)

    def _shortage(self, request: Request, allowed: Sequence[NodeDevices], room: int) -> str:
        free = [len(self._free(node)) for node in allowed]
        limit = request.max_ranks_per_node
        return (
            f"{request.name}: {request.num_ranks * request.devices_per_rank} devices asked "
            f"({request.num_ranks} ranks x {request.devices_per_rank}), {sum(free)} free on {len(allowed)} nodes; "
            f"the largest single node has {max(free, default=0)} free; room for {room} ranks"
            + (f" (at most {limit} on a node)" if limit else "")
            + (f" (exactly {request.ranks_per_node} on each node)" if request.ranks_per_node else "")
        )
