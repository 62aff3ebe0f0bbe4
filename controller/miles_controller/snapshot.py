"""The status snapshot: the run as plain values, for the status page, ``miles status`` and error reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from miles_agents.wire.envelope import Address

if TYPE_CHECKING:
    from miles_controller.controller import Controller
    from miles_controller.meshes import MeshSupervisor

_LAST_EVENTS = 50


def snapshot(controller: Controller, meshes: Sequence[MeshSupervisor]) -> dict[str, Any]:
    """Nodes, meshes with their ranks and the calls these owe, services, locks, counters, the last events."""
    fabric = controller.fabric
    now = fabric.loop.time()
    return {
        "run_id": controller.run_id,
        "run_dir": None if controller.config.run_dir is None else str(controller.config.run_dir),
        "at": time.time(),
        "job": None if controller.describe_job is None else dict(controller.describe_job()),
        "address": controller.address,
        "nodes": [_node(controller, name, now) for name in fabric.membership.members],
        "meshes": [_mesh(controller, mesh, now) for mesh in meshes],
        "services": controller.services.snapshot(),
        "locks": controller.locks.snapshot(),
        "counters": {
            "calls_open": len(fabric.node.calls),
            "in_flight": len(fabric.switch.in_flight),
            "late_answers": fabric.node.calls.stats.late,
            "undeliverable": fabric.switch.dropped,
            "impostors": fabric.impostors,
            "dropped": dict(fabric.link.stats.dropped),
            "transport": asdict(fabric.link.transport.stats),
        },
        "events": [asdict(event) for event in list(controller.events.history)[-_LAST_EVENTS:]],
    }


def _node(controller: Controller, name: str, now: float) -> dict[str, Any]:
    member = controller.fabric.membership.members[name]
    node = controller.fabric.find(name)
    found: dict[str, Any] = {
        "name": name,
        "state": member.state,
        "incarnation": member.incarnation,
        "heard_s_ago": now - member.heard_at if member.incarnation is not None else None,
        "link_up": member.link_up,
    }
    if node is not None:
        found["inventory"] = node.info.to_plain()
        found["lag_s"] = node.facts.get("lag_s", 0.0)
        found["zygotes"] = node.facts.get("zygotes", [])
        found["store"] = node.facts.get("store")
    return found


def _mesh(controller: Controller, mesh: MeshSupervisor, now: float) -> dict[str, Any]:
    found = mesh.snapshot()
    in_flight = controller.fabric.switch.in_flight
    for rank in found["ranks"]:
        owed = in_flight.pending_at(Address(mesh.mesh, rank["rank"], rank["incarnation"]))
        rank["owes"] = [{"method": passed.method, "age_s": now - passed.since} for passed in owed[:10]]
        rank["num_owed"] = len(owed)
    return found
