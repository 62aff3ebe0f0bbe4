"""What the stores of the nodes ask of the controller: who is there, and how a node ended that is not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_controller.controller import Controller

_ENDS = ("node_dead", "node_gone")


class StoreDesk:
    """Consumes questions of agents; keeps nothing."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def endpoints(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Name to function."""
        return {"store_nodes": self.nodes}

    async def nodes(self, home: str) -> list[Any]:
        """The agents that live, as ``[name, rank, incarnation]``, and the story of the last end of node ``home``."""
        living = [[node.name, node.rank, node.incarnation] for node in self._controller.fabric.nodes if node.peer]
        ends = (e for e in reversed(self._controller.events.history) if e.subject == home and e.kind in _ENDS)
        end = next(ends, None)
        return [living, "" if end is None else f"node {home} ended: {end.text}"]
