"""The controller's side of the network: agents that come and go, and the switch between all processes.

Consumes: HELLOs, beats and envelopes of agents; calls of the controller itself; evidence of deaths from outside.
Produces: routes, errors for receivers that are gone, ``NodeJoined``/``NodeEnded`` for the layer above. Waits for:
nothing; a timer drives membership. Invariants: a node speaks only for itself and its own workers; a message carries
its receiver's incarnation or is refused; when a node is dead its session is over, and whatever it still says is
refused; every request that was passed to it has been answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from miles_agents.errors import MilesError
from miles_agents.names import checked_name
from miles_agents.node_info import BadNodeInfo, NodeInfo
from miles_agents.rpc.errors import NodeLost, NoSuchActor, StaleHandle
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Extent, Shape
from miles_agents.rpc.switch import Hop, LocalHop, Switch
from miles_agents.timings import Timings
from miles_agents.wire.envelope import AGENT_MESH, CONTROLLER_MESH, Address, Envelope, Target
from miles_agents.wire.keys import AllowList
from miles_agents.wire.link import LinkAcceptor
from miles_agents.wire.link_handlers import Admission, Refusal
from miles_agents.wire.peer import Peer
from miles_agents.wire.session import NETWORK
from miles_agents.wire.transport import Transport
from miles_controller import membership
from miles_controller.events import EventLog
from miles_controller.membership import Membership

logger = logging.getLogger(__name__)


class FabricObserver(Protocol):
    """Who wants to know of nodes."""

    def on_node_joined(self, node: Node) -> None:
        """A node can be used."""

    def on_node_ended(self, node: Node, error: MilesError) -> None:
        """A node's incarnation is over; its workers are answered for already."""

    def on_node_beat(self, node: Node, facts: dict[str, Any]) -> None:
        """A node's beat brought news of its workers."""


@dataclass(slots=True)
class WorkerRoute:
    """Where a rank lives. ``dead``: why nobody answers there any more."""

    address: Address
    node: Node
    label: str
    dead: MilesError | None = None


class Node:
    """One incarnation of one node. Also the hop to it."""

    answers_for_itself = False

    def __init__(self, name: str, rank: int, incarnation: int, info: NodeInfo, session_id: int) -> None:
        self.name = name
        self.session_id = session_id
        self.rank = rank
        self.incarnation = incarnation
        self.info = info
        self.peer: Peer | None = None
        self.over: MilesError | None = None
        self.ended = asyncio.Event()
        self.facts: dict[str, Any] = {}
        self.farewell = ""
        self.workers: dict[tuple[int, int], WorkerRoute] = {}
        self.reaper = 0
        self._waiting: list[Envelope] = []

    @property
    def address(self) -> Address:
        """The agent's own."""
        return Address(AGENT_MESH, self.rank, self.incarnation)

    def send(self, envelope: Envelope) -> None:
        """Pass on a message."""
        if self.peer is None:
            self._waiting.append(envelope)
        else:
            self.peer.send(envelope)

    def attach(self, peer: Peer) -> None:
        """Its session is open."""
        self.peer = peer
        waiting, self._waiting = self._waiting, []
        for envelope in waiting:
            peer.send(envelope)


@dataclass(slots=True)
class _Seat:
    """A node name that may join, and its place in the mesh of agents."""

    rank: int
    node: Node | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class Fabric:
    """See the module's docstring."""

    def __init__(
        self, observer: FabricObserver, allow: AllowList, timings: Timings, events: EventLog, number: Callable[[], int]
    ) -> None:
        self.overdue_s = 60.0
        self.loop = asyncio.get_running_loop()
        self.timings = timings
        self.membership = Membership((), timings, number=number)
        self.switch = Switch(self._resolve)
        self.node = RpcNode(Address(CONTROLLER_MESH, 0, number()), "controller", self.switch.route)
        self.switch.attach(self.node)
        self.link = LinkAcceptor(self, NETWORK)
        self.workers: dict[tuple[int, int], WorkerRoute] = {}
        self.impostors = 0
        self.dismissed: dict[str, str] = {}
        self._self_hop = LocalHop(self.node)
        self._observer = observer
        self._allow = allow
        self._events = events
        self._seats: dict[str, _Seat] = {}
        self._by_rank: list[_Seat] = []
        self._by_session: dict[int, Node] = {}
        self._by_peer: dict[Peer, Node] = {}
        self._refusal = ""
        self._timer: asyncio.TimerHandle | None = None

    def start(self, listen: Callable[[Any], Transport]) -> None:
        """Listen, and begin to judge silence."""
        self.link.attach(listen)
        self._tick()

    def close(self, error: MilesError) -> None:
        """Leave the network; every call ends with ``error``."""
        if self._timer is not None:
            self._timer.cancel()
        self.link.close()
        self.node.close(error)

    # -- nodes -----------------------------------------------------------------------------------------------

    def expect(self, name: str) -> None:
        """A node of that name may join. Raises BadName."""
        checked_name("node", name)
        if name not in self._seats:
            seat = self._seats[name] = _Seat(len(self._seats))
            self._by_rank.append(seat)
            self.membership.members.setdefault(name, membership.Member(name))

    @property
    def nodes(self) -> list[Node]:
        """The living nodes, in the order in which their names were made known."""
        return [seat.node for seat in self._seats.values() if seat.node is not None]

    def find(self, name: str) -> Node | None:
        """The living node of that name."""
        seat = self._seats.get(name)
        return seat.node if seat is not None else None

    def agent_at(self, address: Address) -> Node | None:
        """The living node whose agent has this address."""
        if address.mesh != AGENT_MESH or address.rank >= len(self._by_rank):
            return None
        node = self._by_rank[address.rank].node
        return node if node is not None and node.incarnation == address.incarnation else None

    async def wait_for(self, name: str) -> Node:
        """Until a node of that name lives."""
        seat = self._seats[name]
        while seat.node is None:
            seat.arrived.clear()
            await seat.arrived.wait()
        return seat.node

    def agent(self, node: Node) -> ActorMesh:
        """The handle of a node's agent."""
        info = MeshInfo(AGENT_MESH, f"agent of {node.name}", {node.rank: node.incarnation})
        return ActorMesh(info, Shape(Extent((), ()), (node.rank,)), self.node)

    def evidence(self, name: str, cause: str, *, reaper: int | None = None) -> None:
        """Somebody saw the end of a node's agent and of all that it started (None: the current one)."""
        node = self.find(name)
        if node is not None and reaper not in (None, node.reaper):
            self._events.emit("node_exit_late", name, f"an earlier reaper, pid {reaper}, has ended: {cause}")
        elif node is not None:
            self._apply(membership.Evidence(name, node.incarnation, cause))

    def add_worker(self, route: WorkerRoute) -> None:
        """A rank lives there from now on, and not where it lived before."""
        key = (route.address.mesh, route.address.rank)
        self.drop_worker(*key)
        self.workers[key] = route.node.workers[key] = route

    def drop_worker(self, mesh: int, rank: int) -> None:
        """Its mesh has ended."""
        route = self.workers.pop((mesh, rank), None)
        if route is not None:
            route.node.workers.pop((mesh, rank), None)

    def worker_died(self, address: Address, error: MilesError) -> WorkerRoute | None:
        """An agent reported the end of a worker (and has answered for it). None if that was known."""
        route = self.workers.get((address.mesh, address.rank))
        if route is None or route.address != address or route.dead is not None:
            return None
        route.dead = error
        self.switch.receivers_died({address}, error)
        return route

    # -- routing ---------------------------------------------------------------------------------------------

    def _resolve(self, mesh: int, target: Target) -> Hop | MilesError:
        if mesh == CONTROLLER_MESH:
            own = self.node.address
            return self._self_hop if target.incarnation == own.incarnation else _stale(mesh, target)
        if mesh == AGENT_MESH:
            return self._resolve_agent(target)
        route = self.workers.get((mesh, target.rank))
        if route is None:
            return _unknown(mesh, target)
        if route.address.incarnation != target.incarnation:
            return _stale(mesh, target)
        return route.dead or route.node.over or route.node

    def _resolve_agent(self, target: Target) -> Hop | MilesError:
        if target.rank >= len(self._by_rank):
            return _unknown(AGENT_MESH, target)
        node = self.agent_at(Address(AGENT_MESH, target.rank, target.incarnation))
        return node if node is not None else _stale(AGENT_MESH, target)

    def _speaks_for(self, node: Node, source: Address) -> bool:
        route = self.workers.get(source[:2])
        if route is not None and route.node is node and route.address == source:
            return True
        return source == node.address

    # -- what the link says ----------------------------------------------------------------------------------

    def admit(self, hello: dict[str, Any], user_id: str, session_id: int) -> Admission | Refusal:
        """An agent dials for the first time: membership decides."""
        name = str(hello.get("node"))
        owner = self._allow.node_of(user_id)
        if owner != name:
            self.impostors += 1
            self._events.emit("node_refused", name, f"a key issued for {owner!r} claims to be {name!r}")
            return Refusal(f"this key was issued for another node than {name!r}")
        try:
            info = NodeInfo.from_plain(hello.get("info"))
        except BadNodeInfo as error:
            return Refusal(f"{error.what}: {error.evidence}")
        if info.node != name:
            return Refusal(f"{name!r} describes itself as another node: field 'node' = {info.node!r}")
        self._refusal = ""
        self._believe_fenced(name, hello.get("fenced"))
        if name in self.dismissed:
            return Refusal(f"the run does not want this node any more: {self.dismissed[name]}")
        self._apply(membership.Hello(name, str(session_id), info))
        node = self._by_session.get(session_id)
        if node is None:
            return Refusal(self._refusal or "the node cannot join now", final=name not in self._seats)
        reaper = hello.get("reaper")
        node.reaper = reaper if isinstance(reaper, int) else 0
        grant = {
            "incarnation": node.incarnation,
            "rank": node.rank,
            "controller": self.node.address.incarnation,
            "timings": asdict(self.timings),
            "overdue_s": self.overdue_s,
        }
        return Admission(name, grant)

    def _believe_fenced(self, name: str, sessions: object) -> None:
        """An agent tells which of its lives it has ended; whoever only has its key does not know their session ids."""
        for session in sessions if isinstance(sessions, list) else ():
            node = self._by_session.get(session) if isinstance(session, int) else None
            if node is not None and node.name == name:
                cause = "its agent fenced itself, ended everything and joins again"
                self._apply(membership.Evidence(name, node.incarnation, cause))

    def on_peer_up(self, peer: Peer, *, resumed: bool) -> None:
        """An agent is connected (again)."""
        node = self._by_session.get(peer.session.session_id)
        if node is None:
            self.link.end_session(peer)
            return
        self._apply(membership.LinkUp(node.name))
        if node.peer is None:
            self._by_peer[peer] = node
            node.attach(peer)
            self._seats[node.name].arrived.set()
            self._events.emit("node_joined", node.name, f"joined with {len(node.info.devices)} devices")
            self._observer.on_node_joined(node)

    def on_peer_down(self, peer: Peer) -> None:
        """A hint; the lease decides."""
        node = self._by_peer.get(peer)
        if node is not None:
            self._apply(membership.LinkDown(node.name))
            self._events.emit("node_link_down", node.name, "the connection is gone; its lease runs on")

    def on_envelope(self, peer: Peer, envelope: Envelope) -> None:
        """From an agent or one of its workers to anybody."""
        node = self._by_peer.get(peer)
        if node is None or not self._speaks_for(node, envelope.source):
            self.link.stats.drop("message in another's name")
            return
        self.switch.route(envelope)

    def on_beat(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        """An agent lives."""
        node = self._by_peer.get(peer)
        if node is not None:
            node.facts = facts
            self._apply(membership.Beat(node.name, node.incarnation, beat_id))
            self._observer.on_node_beat(node, facts)
        return {}

    def on_answer(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> None:
        """Controllers do not beat."""

    def on_goodbye(self, peer: Peer, reason: str) -> None:
        """An agent leaves in good order: everything of it has ended."""
        node = self._by_peer.get(peer)
        if node is not None:
            node.farewell = reason
            self._apply(membership.Goodbye(node.name, node.incarnation))

    # -- membership ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        try:
            self._apply(membership.Tick())
        finally:
            self._timer = self.loop.call_later(self.timings.beat_s / 2, self._tick)

    def _apply(self, event: membership.Event) -> None:
        now = self.loop.time()
        for effect in self.membership.step(event, now):
            match effect:
                case membership.Welcome(name, session, incarnation):
                    self._welcome(name, int(session or 0), incarnation)
                case membership.Refuse(name, reason):
                    self._refusal = reason
                case membership.Suspect(name, _, silence_s):
                    self._events.emit("node_suspect", name, f"silent for {silence_s:.1f} s")
                case membership.Recovered(name, _):
                    self._events.emit("node_recovered", name, "heard again")
                case membership.NodeDead(name, _, cause):
                    story = self.membership.describe(name, now)
                    self._end(name, "node_dead", cause, story)
                case membership.NodeGone(name, _):
                    node = self.find(name)
                    farewell = node.farewell if node is not None else ""
                    self._end(name, "node_gone", f"it said goodbye: {farewell}", "")

    def _welcome(self, name: str, session_id: int, incarnation: int) -> None:
        seat = self._seats[name]
        info = self.membership.members[name].info
        assert info is not None
        node = Node(name, seat.rank, incarnation, info, session_id)
        seat.node = node
        self._by_session[session_id] = node

    def _end(self, name: str, kind: str, cause: str, story: str) -> None:
        """A life of a node is over; ``kind`` is the event's. Only the first line of the cause makes headlines."""
        seat = self._seats[name]
        node, seat.node = seat.node, None
        if node is None:
            return
        headline, _, details = cause.partition("\n")
        error = NodeLost(
            f"node {name} (incarnation {node.incarnation}) is lost: {headline}",
            evidence="\n".join(part for part in (details, story) if part) or cause,
            advice="Look at the node (power, network, its agent's log); what ran there has been fenced.",
            node=name,
            may_have_run=True,
        )
        node.over = error
        node.ended.set()
        self._by_session.pop(node.session_id, None)
        if node.peer is not None:
            self._by_peer.pop(node.peer, None)
            self.link.end_session(node.peer)
        gone = {node.address}
        for route in node.workers.values():
            if route.dead is None:
                route.dead = error
                gone.add(route.address)
        self.switch.receivers_died(gone, error)
        self._events.emit(kind, name, headline, details=details)
        self._observer.on_node_ended(node, error)


def _stale(mesh: int, target: Target) -> StaleHandle:
    return StaleHandle(
        f"rank {target.rank} of mesh {mesh} is not incarnation {target.incarnation} any more",
        evidence="the process that the handle names was replaced, or its node was",
        advice="Get a fresh handle with lookup(name); if it is being restarted, wait for `worker_restarted` first.",
        may_have_run=False,
    )


def _unknown(mesh: int, target: Target) -> NoSuchActor:
    return NoSuchActor(
        f"there is no rank {target.rank} of mesh {mesh}",
        evidence="the mesh was stopped, or never was",
        advice="Get a fresh handle with lookup(name).",
        may_have_run=False,
    )
