"""An engine that spans nodes: one SGLang server on each, which live and die together.

The first serves requests; the others only answer health probes, and their ranks take orders from the first one's. They
meet at a port of the first node that its agent leases to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from miles.backends.sglang_utils.places import Place
from miles_agents.errors import MilesError
from miles_controller import Controller
from miles_controller.services import ServiceHandle

StartPart = Callable[[Place, dict[str, Any]], Awaitable[ServiceHandle]]
"""Starts the server of one part with these further arguments, and waits until it is ready."""
_WORST_FIRST = ("lost", "dead", "unhealthy")


class SpanningService:
    """The parts as one service (``fleet_parts.EngineService``). As long as one part fails, it is what the engine is."""

    def __init__(self, controller: Controller, name: str, parts: Sequence[ServiceHandle]) -> None:
        self.name = name
        self._controller = controller
        self._parts = list(parts)

    @property
    def url(self) -> str:
        """Where requests go."""
        return self._parts[0].url

    @property
    def phase(self) -> str:
        """That of the part that is worst off."""
        return self._worst().phase

    @property
    def fault(self) -> str:
        """Of the same part, with its node."""
        worst = self._worst()
        return f"its part on {worst.node}: {worst.fault}" if worst.fault else ""

    @property
    def log(self) -> str:
        """Of the same part."""
        worst = self._worst()
        return f"{worst.log} (on {worst.node})"

    async def pause(self) -> None:
        """Do not probe its health until ``resume``."""
        await self._all(*(part.pause() for part in self._parts))

    async def resume(self) -> None:
        """Probe its health again."""
        await self._all(*(part.resume() for part in self._parts))

    async def fence(self, why: str) -> None:
        """It counts no more: kill all parts."""
        await self._all(*(part.fence(why) for part in self._parts if part.phase not in ("dead", "lost")))

    async def stop(self, why: str = "its owner stopped it") -> None:
        """End all parts, whatever becomes of one of them."""
        try:
            await self._all(*(part.stop(why) for part in self._parts if part.phase not in ("dead", "lost")))
        finally:
            await release_meeting(self._controller, self._parts[0].node, self.name)

    async def wait_for_phase(self, *phases: str, timeout_s: float) -> str:
        """Until it is in one of these phases; returns which. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.phase not in phases:
                changes = [part.next_change() for part in self._parts]
                try:
                    await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for change in changes:
                        change.cancel()
        return self.phase

    def _worst(self) -> ServiceHandle:
        for phase in _WORST_FIRST:
            for part in self._parts:
                if part.phase == phase:
                    return part
        return self._parts[0]

    async def _all(self, *calls: Awaitable[None]) -> None:
        """Every one is tried. Raises the first error."""
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result


async def start_spanning(
    controller: Controller, name: str, places: Sequence[Place], start_part: StartPart
) -> SpanningService:
    """Start all parts at once, for each waits for the others.

    Raises:
        What ``start_part`` raises for the first part that fails; nothing is left then.
    """
    head = places[0]
    port = await controller.services.lease_port(head.node, _meeting(name))
    address = controller.address_of(head.node)
    host = f"[{address}]" if ":" in address else address
    shared = {"nnodes": len(places), "dist_init_addr": f"{host}:{port}"}
    tasks = [
        asyncio.ensure_future(start_part(place, {**shared, "node_rank": rank})) for rank, place in enumerate(places)
    ]
    try:
        return SpanningService(controller, name, await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(done, ServiceHandle):
                await _quietly(done.stop("another part of the engine did not start"))
        await release_meeting(controller, head.node, name)
        raise


async def release_meeting(controller: Controller, node: str | None, name: str) -> None:
    """Give the port back at which the parts meet; a node that is gone has it no more."""
    await _quietly(controller.services.release_port(node, _meeting(name)))


def _meeting(name: str) -> str:
    return f"{name} (meeting)"


async def _quietly(call: Awaitable[None]) -> None:
    with contextlib.suppress(MilesError):  # what it was about is gone
        await call
