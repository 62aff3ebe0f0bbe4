"""How a store reaches the stores of other agents, and the controller.

``Peers`` is what ``others`` and ``removals`` need; ``MeshPeers`` does it with calls between agents. Invariants: each
question has a deadline; ``GONE`` is raised only where the agent that was asked has ended, and its objects with it.
"""

from __future__ import annotations

from typing import Any, Protocol

from miles_agents.errors import PeerFault
from miles_agents.rpc.context import outside_of_calls
from miles_agents.rpc.errors import CallCancelled, DeadlineExceeded, NodeLost, NoSuchActor, StaleHandle, WindowFull
from miles_agents.rpc.future import CallFuture
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Extent, Shape
from miles_agents.store.ref import Ref
from miles_agents.wire.envelope import AGENT_MESH, Address

ORDER_S = 30.0
"""The longest that an agent is waited for at a time, where nobody's deadline says otherwise."""
PAUSE_S = 0.5
"""Before somebody who could not answer is asked again."""
GONE = (NodeLost, StaleHandle, NoSuchActor)
NO_ANSWER: tuple[type[PeerFault], ...] = (DeadlineExceeded, WindowFull, CallCancelled)
"""Says nothing about what the other has or has done: ask again."""
Place = tuple[str, int, int]
"""A living agent: name of its node, rank, incarnation."""


class Peers(Protocol):
    """Other agents, and the controller."""

    async def ask(self, place: Place, timeout_s: float, order: str, *args: Any) -> Any:
        """The answer of one agent. Raises one of ``GONE``, ``NO_ANSWER``, or what the order raised there."""

    async def nodes(self, home: str, timeout_s: float) -> tuple[list[Place], str]:
        """The other agents that live, and how that of ``home`` ended. Raises DeadlineExceeded, ControllerLost."""

    def report(self, kind: str, what: str, evidence: str) -> None:
        """Let the run know, if it can be reached."""


class MeshPeers:
    """See ``Peers``. ``own``: the address of this agent."""

    def __init__(self, own: Address, node: RpcNode, controller: ActorMesh) -> None:
        self._own = own
        self._node = node
        self._controller = controller

    async def ask(self, place: Place, timeout_s: float, order: str, *args: Any) -> Any:
        """See ``Peers``."""
        name, rank, incarnation = place
        info = MeshInfo(AGENT_MESH, f"agent of {name}", {rank: incarnation})
        agent = ActorMesh(info, Shape(Extent((), ()), (rank,)), self._node).options(timeout_s=timeout_s)
        return await agent.endpoint(order).call_one(*args)

    async def nodes(self, home: str, timeout_s: float) -> tuple[list[Place], str]:
        """See ``Peers``."""
        asked = self._controller.options(timeout_s=timeout_s).endpoint("store_nodes").call_one(home)
        found, story = await asked
        own = (self._own.rank, self._own.incarnation)
        return [(name, rank, inc) for name, rank, inc in found if (rank, inc) != own], story

    def report(self, kind: str, what: str, evidence: str) -> None:
        """See ``Peers``."""
        tell = self._controller.endpoint("store_trouble").broadcast
        outside_of_calls().run(tell, kind, what, evidence).add_done_callback(nobody_cares)


def nobody_cares(told: CallFuture[None]) -> None:
    """For reports: they fail only when this life leaves the run."""
    told.exception()


def home_of(ref: Ref) -> Place:
    """The agent where it was put."""
    return ref.home, ref.key.rank, ref.key.incarnation
