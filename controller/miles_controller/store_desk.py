"""What the stores of the nodes ask of the controller: who is there, and how a node ended that is not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from miles_agents.rpc.context import current_call

if TYPE_CHECKING:
    from miles_controller.controller import Controller

_ENDS = ("node_dead", "node_gone")
_TROUBLES = ("store_full", "object_lost")


class StoreDesk:
    """Consumes questions of agents; keeps nothing."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def endpoints(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Name to function."""
        return {"store_nodes": self.nodes, "store_trouble": self.trouble}

    async def nodes(self, home: str) -> list[Any]:
        """The agents that live, as ``[name, rank, incarnation]``, and the story of the last end of node ``home``."""
        living = [[node.name, node.rank, node.incarnation] for node in self._controller.fabric.nodes if node.peer]
        ends = (e for e in reversed(self._controller.events.history) if e.subject == home and e.kind in _ENDS)
        end = next(ends, None)
        return [living, "" if end is None else f"node {home} ended: {end.text}"]

    async def trouble(self, kind: str, what: str, evidence: str) -> None:
        """A worker of the calling agent's node got no room, or asked for what is lost."""
        source = current_call().source
        node = next((node for node in self._controller.fabric.nodes if node.address == source), None)
        if node is not None and kind in _TROUBLES:
            self._controller.events.emit(kind, node.name, str(what)[:1000], evidence=str(evidence)[:8000])
