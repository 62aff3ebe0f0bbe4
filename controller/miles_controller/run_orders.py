"""What a person can order of a run from another process: ``miles stack``, ``miles stop``.

Consumes: queries that came with the run's token. Produces: plain values, or an error that is told to the person.
Waits for: an agent that fetches a stack, seconds at most. Invariant: an order names what it is for in full, or
there is only one such thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miles_agents.errors import ConfigError
from miles_controller.status_server import Order

if TYPE_CHECKING:
    from miles_controller.controller import Controller
    from miles_controller.meshes import MeshSupervisor

_RANK = re.compile(r"(?:(?P<mesh>.*?)(?:\[|-))?(?P<rank>[0-9]{1,9})\]?")
_FIRST = "trainer"
"""The mesh that is meant by a rank without a name, where there are several."""


class NoSuchRank(ConfigError):
    """No living mesh of the run has a rank of that name."""

    code = "E-MESH-005"


class CannotBeStopped(ConfigError):
    """The program that runs this controller gave no way to end it from outside."""

    code = "E-RUN-001"


class RunOrders:
    """See the module's docstring."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def by_path(self) -> dict[str, Order]:
        """For the status server."""
        return {"/stack": self.stack, "/stop": self.stop}

    async def stack(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The Python stacks of all threads of a rank: ``rank`` is ``trainer[1]``, ``trainer-1``, or ``1``.

        Raises:
            NoSuchRank: There is none, or it is a process that is not ours inside (an engine).
            MilesError: The rank is dead, or its node, or its agent does not answer in time.
        """
        mesh, rank = self._find(query.get("rank", ""))
        text = await mesh.stack(rank)
        there = mesh.ranks[rank]
        return {"rank": f"{mesh.name}[{rank}]", "node": there.slot.node, "pid": there.pid, "stack": text}

    async def stop(self, query: Mapping[str, str]) -> dict[str, Any]:
        """End the run in good order; returns when that has begun. Raises CannotBeStopped."""
        on_stop = self._controller.on_stop
        if on_stop is None:
            raise CannotBeStopped(
                f"run {self._controller.run_id} cannot be stopped from outside",
                evidence="its program has not said how (Controller.on_stop)",
                advice="End the program itself; all that it started ends with it.",
            )
        on_stop(query.get("by") or "miles stop")
        return {"stopping": True}

    def _find(self, text: str) -> tuple[MeshSupervisor, int]:
        living = {mesh.name: mesh for mesh in self._controller.meshes.living}
        match = _RANK.fullmatch(text.strip())
        name = match["mesh"] if match else text.strip()
        if not name:
            name = _FIRST if _FIRST in living or len(living) != 1 else next(iter(living))
        mesh = living.get(name)
        rank = int(match["rank"]) if match else 0
        if mesh is None or rank >= len(mesh.ranks) or (match is None and len(mesh.ranks) > 1):
            raise self._no_such(text, living)
        return mesh, rank

    def _no_such(self, text: str, living: Mapping[str, MeshSupervisor]) -> NoSuchRank:
        known = ", ".join(f"{m.name}[0-{len(m.ranks) - 1}]" if len(m.ranks) > 1 else f"{m.name}[0]"
                          for m in living.values())  # fmt: skip
        services = [service["name"] for service in self._controller.services.snapshot()]
        advice = "Name one of those."
        if text.strip() in services:
            advice = f"It is a program that is not ours inside; read its output with `miles logs {text.strip()}`."
        return NoSuchRank(f"no rank {text!r} is in the run", evidence=f"ranks: {known or 'none'}", advice=advice)
