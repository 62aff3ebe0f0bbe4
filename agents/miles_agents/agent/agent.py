"""The agent: one life of a node in a run, from HELLO to fence or goodbye.

Consumes: the controller's orders (``Orders``), workers' messages, exits of processes, the clock. Produces: workers and
services under supervision; their messages on the way; answers for those that died; reports to the controller; beats.
Waits for: the controller, for as long as the lease lasts. What unblocks everything else: pidfds, links, deadlines.

Invariants: workers reach the network only through here; a message of theirs carries their own address or is dropped; a
request passed to a worker is answered by it or, at its death, from here; when ``run`` returns, nothing that this life
started still runs, and when it raises for that reason, the error names what does; the failure of a task costs no other
anything. It knows transports and process starting only by their interfaces.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_agents.agent import lease as leases
from miles_agents.agent.background import Background
from miles_agents.agent.errors import AgentRefused, ControllerUnreachable
from miles_agents.agent.farewell import GOODBYE_S, say_goodbye
from miles_agents.agent.lease import BeatAnswered, BeatSent, Fence, Lease, LinkDown, LinkUp, StdinClosed, Tick
from miles_agents.agent.log_forward import LogForwarder
from miles_agents.agent.logs import OpenTail
from miles_agents.agent.orders import Orders
from miles_agents.agent.overdue_reports import OverdueReports
from miles_agents.agent.relay import Relay
from miles_agents.agent.service import PortLessor, ProcessStarter
from miles_agents.agent.starter import WorkerStarter
from miles_agents.agent.worker_ending import WorkerWouldNotDie
from miles_agents.agent.worker_facts import FactNews
from miles_agents.agent.worker_pool import WorkerPool
from miles_agents.agent.zygotes import Zygotes
from miles_agents.errors import MilesError
from miles_agents.node_info import NodeInfo
from miles_agents.rpc.actor import EndpointInfo
from miles_agents.rpc.errors import ControllerLost
from miles_agents.rpc.host import ActorHost, no_actor
from miles_agents.rpc.inline import InlineExecutors
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Shape
from miles_agents.rpc.switch import Hop, LocalHop, Switch
from miles_agents.store.node_store import NodeStore, StoreParts
from miles_agents.store.others import OtherNodes
from miles_agents.store.peers import MeshPeers
from miles_agents.timings import Timings
from miles_agents.wire.envelope import AGENT_MESH, CALL, CONTROLLER_MESH, Address, Envelope, Target
from miles_agents.wire.link import LinkDialer
from miles_agents.wire.link_handlers import Refusal
from miles_agents.wire.peer import Peer
from miles_agents.wire.session import NETWORK
from miles_agents.wire.transport import Transport

logger = logging.getLogger(__name__)
_ORPHAN_S = 2.0
"""How long an agent whose launcher is gone still waits for its WELCOME."""
_LOG_REST = 4.0
"""After a slice of logs, reading rests for so many times as long as it took: it has a fifth of the loop's time."""
StartTransport = Callable[[Any], Transport]


@dataclass(frozen=True, slots=True)
class AgentParts:
    """What an agent is made of; simulations put twins in.

    ``processes`` and ``ports`` are None where only workers can be started, ``store`` where there is none (simulations).
    ``open_tail`` None: what processes print is in files. ``fenced``: the session ids of earlier lives of this process,
    of which nothing runs any more; nobody but the controller knows them. ``reaper``: the pid of this agent's parent, by
    which its launcher knows it; 0 without one. ``zygotes``: to tell of.
    """

    info: NodeInfo
    dial: StartTransport
    accept: StartTransport
    starter: WorkerStarter
    log_dir: Path
    processes: ProcessStarter | None = None
    ports: PortLessor | None = None
    store: StoreParts | None = None
    base_env: dict[str, str] = field(default_factory=dict)
    fenced: tuple[int, ...] = ()
    reaper: int = 0
    zygotes: Zygotes | None = None
    join_timeout_s: float = 60.0
    forward_logs: bool = True
    open_tail: OpenTail | None = None


class _Uplink:
    """To the controller, whose switch answers for what lies behind it."""

    answers_for_itself = True

    def __init__(self, link: LinkDialer) -> None:
        self._link = link

    def send(self, envelope: Envelope) -> None:
        self._link.peer.send(envelope)


class Agent:
    """One life. ``run`` until it is over; make a new one to join again."""

    def __init__(self, parts: AgentParts, timings: Timings | None = None) -> None:
        self.parts = parts
        self.timings = timings or Timings()
        self.loop = asyncio.get_running_loop()
        self.incarnation = 0
        self._over: asyncio.Future[Fence | MilesError] = self.loop.create_future()
        self._joined = asyncio.Event()
        self._stdin_open = True
        self._lag_s = 0.0
        self._news = FactNews()
        self._ending = ""
        self._graceless = False
        self._dismissed = False
        self._undead: WorkerWouldNotDie | None = None
        self.link = LinkDialer(self, random.SystemRandom().getrandbits(63), self._hello, NETWORK)
        self.uplink = _Uplink(self.link)
        self.switch = Switch(self._resolve)
        self._lease: Lease | None = None
        self._lease_timer: asyncio.TimerHandle | None = None
        self._host: ActorHost | None = None
        self.node: RpcNode | None = None
        self.workers: WorkerPool | None = None
        self.orders: Orders | None = None
        self.store: NodeStore | None = None
        self._other_nodes: OtherNodes | None = None
        self._overdue: OverdueReports | None = None
        self._local: LocalHop | None = None
        self._greeted_at = self.loop.time()
        self._turned_away = ""
        self._early: list[Envelope] | None = []
        self._relay: Relay | None = None

    @property
    def session_id(self) -> int:
        """What only this life and the controller know: who knows it later may speak of this life."""
        return self.link.peer.session.session_id

    @property
    def address(self) -> Address:
        """The agent's own, once it has joined."""
        assert self.node is not None
        return self.node.address

    @property
    def store_path(self) -> str:
        """Where this node's workers ask its store; empty if there is none."""
        return "" if self.store is None else str(self.store.parts.socket_path)

    async def run(self) -> Fence:
        """Join, serve, and end cleanly; returns why it ended.

        Raises:
            AgentRefused: the controller does not want this node, or not within ``join_timeout_s``.
            ControllerUnreachable: no answer within ``join_timeout_s``.
            WorkerWouldNotDie: something that this life started cannot be killed.
        """
        self.link.attach(self.parts.dial)
        background = Background()
        try:
            if not await self._join():
                return self._verdict()
            assert self.workers is not None and self.orders is not None
            self.workers.tasks = self.orders.tasks = background
            if self.store is not None:
                self.store.tasks = background
            self._serve_what_waited()
            background.create_task(self._beat_forever(), name="beats")
            background.create_task(self._forward_logs(), name="log forwarding")
            background.create_task(self._poll_logs(), name="log tails")
            await self._over
            await self._end_everything()
            return self._verdict()
        finally:
            await background.close()
            self.link.close()
            if self._lease_timer is not None:
                self._lease_timer.cancel()
            self._lease = None
            if self._host is not None:
                self._host.close()
            if self.workers is not None:
                self.workers.close()
            if self._other_nodes is not None:
                self._other_nodes.close()
            if self.store is not None:
                self.store.close()
            if self.node is not None:
                self.node.close(_controller_lost())

    def _verdict(self) -> Fence:
        over = self._undead or self._over.result()
        if isinstance(over, MilesError):
            raise over
        return over

    def stdin_closed(self) -> None:
        """The launcher's end of the lifeline is gone."""
        self._stdin_open = False
        self._lease_event(StdinClosed())
        if self._lease is None:  # the WELCOME may be under way, and the controller counts on this node by now
            self.loop.call_later(_ORPHAN_S, self._end_unless_joined)

    def _end_unless_joined(self) -> None:
        if self._lease is None:
            self._finish(Fence("the launcher went away before the controller was reached"))

    def end(self, fence: Fence) -> None:
        """End this life for a reason of the process around it; ``fence.orderly`` gives workers their grace."""
        self._finish(fence)

    async def _join(self) -> bool:
        """Until WELCOME; False if this life is over before, and the controller does not count on this node."""
        joined = self.loop.create_task(self._joined.wait())
        waits: set[asyncio.Future[Any]] = {joined, self._over}
        try:
            async with asyncio.timeout(self.parts.join_timeout_s):
                while not self._joined.is_set() and not self._over.done():
                    self.link.beat({})  # says HELLO again where the first was lost
                    await asyncio.wait(waits, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if not self._joined.is_set() and self.link.has_greeted:
                # Its WELCOME can be under way. Without a goodbye the controller would wait for the end of the lease.
                await asyncio.wait([joined], timeout=GOODBYE_S)
        except TimeoutError:
            if self._turned_away:
                reason = f"{self._turned_away}; it was asked for {self.parts.join_timeout_s:g} s"
                raise AgentRefused.because(self, reason) from None
            raise ControllerUnreachable.because(self, f"no WELCOME within {self.parts.join_timeout_s} s") from None
        finally:
            joined.cancel()
        return self._joined.is_set()

    async def _end_everything(self) -> None:
        """Whatever failed before: end workers and services, and tell the controller. The lease is judged meanwhile."""
        assert self.workers is not None and self.orders is not None
        over = self._over.result()
        orderly = isinstance(over, Fence) and over.orderly
        reason = self._ending = over.reason if isinstance(over, Fence) else over.what
        logger.info("%s ends: %s", self.parts.info.node, reason)
        self._order_the_end(reason, orderly=orderly and not self._graceless)
        left = [*await self.workers.wait_all_dead(), *await self.orders.wait_all_dead()]
        if left:
            what = f"the agent of {self.parts.info.node} ends, but cannot end everything that it started"
            self._undead = WorkerWouldNotDie.because(what, left)
            logger.error("%s", self._undead)
            reason = "; ".join([f"{reason}; not everything could be ended", *left])
        if orderly and not self._graceless:
            with self.link.boundary("sending the last logs"):
                await self.workers.logs.flush(self.loop.time() + 1.0)
        # Also after a fence: whoever can still be told need not wait for the lease to end.
        with self.link.boundary("saying goodbye"):
            await say_goodbye(self.link, reason, is_dismissed=lambda: self._dismissed)

    def _order_the_end(self, why: str, *, orderly: bool) -> None:
        assert self.workers is not None and self.orders is not None
        with self.link.boundary("ending the workers"):
            self.workers.end_all(why, orderly=orderly)
        with self.link.boundary("ending the services"):
            self.orders.end_all(why, orderly=orderly)

    # -- routing ---------------------------------------------------------------------------------------------

    def _resolve(self, mesh: int, target: Target) -> Hop | MilesError:
        node, workers = self.node, self.workers
        assert node is not None and workers is not None
        if mesh == AGENT_MESH and target.rank == node.address.rank:
            if target.incarnation != self.incarnation:
                return workers.stale(mesh, target)
            assert self._local is not None
            return self._local
        return workers.resolve(mesh, target) or self.uplink

    def on_envelope(self, peer: Peer, envelope: Envelope) -> None:
        """From the controller: for this agent or one of its workers, and for nobody else."""
        if self._early is not None:  # an order can be in the same batch as the WELCOME
            self._early.append(envelope)
            return
        if len(envelope.targets) == 3:
            self._on_single(envelope, envelope.target)
            return
        receivers = envelope.receivers()
        if self._relay is not None:
            receivers = list(self._relay.spread(envelope, peer.last_heard))
            if not receivers:
                return
            envelope = envelope.to(receivers)
        here = [target for target in receivers if self._resolve(envelope.mesh, target) is not self.uplink]
        if here:
            self.switch.route(envelope if len(here) == len(receivers) else envelope.to(here))
        if envelope.kind == CALL:
            for target in receivers:
                if target not in here:
                    self._answer_unknown(envelope, target)

    def _on_single(self, envelope: Envelope, target: Target) -> None:
        hop = self._resolve(envelope.mesh, target)
        if hop is self.uplink:
            if envelope.kind == CALL:
                self._answer_unknown(envelope, target)
        elif isinstance(hop, MilesError):
            self.switch.route(envelope)
        else:
            self.switch.forward(hop, envelope, target)

    def _serve_what_waited(self) -> None:
        waited, self._early = self._early, None
        for envelope in waited or ():
            with self.link.boundary("an early envelope"):
                self.on_envelope(self.link.peer, envelope)
        assert self.workers is not None
        relay = self._relay = Relay(self.workers, self.switch.in_flight, self.link.peer)
        self.link.relay, self.workers.link.relay = relay.down, relay.up

    def _answer_unknown(self, envelope: Envelope, target: Target) -> None:
        assert self.node is not None and self.workers is not None
        error = self.workers.why_gone(envelope.mesh, target) or no_actor(
            envelope, target, self.node.label, "no such worker runs here"
        )
        receiver = Address(envelope.mesh, target.rank, target.incarnation)
        self.node.answer_error(envelope, error, source=receiver)

    # -- the link to the controller --------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        self._greeted_at = self.loop.time()
        parts = self.parts
        told = {"node": parts.info.node, "info": parts.info.to_plain(), "fenced": list(parts.fenced)}
        return {**told, "reaper": parts.reaper}

    def on_welcome(self, grant: dict[str, Any]) -> None:
        """The controller takes this node into the run."""
        self.incarnation = int(grant["incarnation"])
        self.timings = Timings(**grant["timings"])
        rank = int(grant["rank"])
        label = f"agent of {self.parts.info.node}"
        self.node = RpcNode(Address(AGENT_MESH, rank, self.incarnation), label, self.switch.route)
        self.switch.attach(self.node)
        self._local = LocalHop(self.node)
        run_incarnation = int(grant["controller"])
        info = MeshInfo(CONTROLLER_MESH, "controller", {0: run_incarnation})
        controller = ActorMesh(info, Shape.of(controller=1), self.node)
        logs = LogForwarder(self.parts.info.node, self._send_logs(controller), open_tail=self.parts.open_tail)
        self.workers = WorkerPool(self, controller, logs)
        if self.parts.store is not None:
            self.store = NodeStore(self.parts.store, self.parts.info.node, self.address, self.workers.label_of)
            peers = MeshPeers(self.address, self.node, controller)
            self.store.others = self._other_nodes = OtherNodes(self.store, peers)
        self.orders = Orders(self, controller)
        if self.parts.zygotes is not None:
            self.parts.zygotes.news = self.orders.zygote_news
        self._overdue = OverdueReports(self, controller, float(grant["overdue_s"]))
        host = self._host = ActorHost(self.node, InlineExecutors(self.loop))
        asked_by_agents = {} if self._other_nodes is None else self._other_nodes.endpoints()
        for name, function in {**self.orders.endpoints(), **asked_by_agents}.items():
            host.bind(EndpointInfo(name, "io", True, False), function)
        self._lease = Lease.start(
            self._greeted_at, fence_s=self.timings.fence_s, suspect_s=self.timings.suspect_s, link_up=True
        )
        if not self._stdin_open:
            self._lease_event(StdinClosed())
        self._joined.set()

    def on_refused(self, refusal: Refusal) -> None:
        """The controller does not want this life (any more)."""
        if self._lease is not None:
            self._finish(Fence(f"the controller refuses this node: {refusal.reason}"))
        elif refusal.final:
            self._finish(AgentRefused.because(self, refusal.reason))
        else:
            # Its WELCOME may have been lost and its incarnation be over by now; another session can still be welcome.
            self.link.renew_session(random.SystemRandom().getrandbits(63))
            self._turned_away = refusal.reason

    def on_peer_up(self, peer: Peer, *, resumed: bool) -> None:
        """Connected."""
        self._lease_event(LinkUp())

    def on_peer_down(self, peer: Peer) -> None:
        """Not connected; the lease decides."""
        self._lease_event(LinkDown())

    def on_beat(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        """Controllers do not beat; they answer."""
        return {}

    def on_answer(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> None:
        """The controller answered a beat: the lease is renewed."""
        self._news.answered(beat_id)
        self._lease_event(BeatAnswered(beat_id))

    def on_goodbye(self, peer: Peer, reason: str) -> None:
        """The run ends in good order."""
        self._dismissed = True
        self._finish(Fence(f"the controller said goodbye: {reason}", orderly=True))

    # -- time ------------------------------------------------------------------------------------------------

    async def _beat_forever(self) -> None:
        """Also while everything is being ended: the node is held for as long as anything runs."""
        due = self.loop.time()
        while True:
            self._lag_s = max(0.0, self.loop.time() - due)
            with self.link.boundary("a beat"):
                self._beat()
            due = self.loop.time() + self.timings.beat_s
            await asyncio.sleep(self.timings.beat_s)

    def _beat(self) -> None:
        assert self.workers is not None
        self._lease_event(Tick())
        news = self._news.news(self.workers.facts(), self.loop.time())
        facts: dict[str, Any] = {"lag_s": self._lag_s, "stdin_open": self._stdin_open, "workers": news}
        if self.parts.zygotes is not None and (zygotes := self.parts.zygotes.facts()):
            facts["zygotes"] = zygotes
        if self.store is not None:
            facts["store"] = self.store.facts()
        beat = self.link.beat(facts)
        self._news.sent(beat, news, self.loop.time())
        self._lease_event(BeatSent(beat))
        self.workers.tick()
        if self._overdue is not None:
            self._overdue.tick()

    async def _poll_logs(self) -> None:
        assert self.workers is not None
        while True:
            await asyncio.sleep(0.1)
            with self.link.boundary("reading logs"):
                began = self.loop.time()
                for _ in self.workers.logs.turns(began):
                    # Between two slices of a flood everything else goes first, and has most of the time.
                    await asyncio.sleep(_LOG_REST * (self.loop.time() - began))
                    began = self.loop.time()

    async def _forward_logs(self) -> None:
        assert self.workers is not None
        while True:
            with self.link.boundary("forwarding logs"):
                await self.workers.logs.run()
            await asyncio.sleep(1.0)

    def _send_logs(self, controller: ActorMesh) -> Callable[[list[Any]], Awaitable[float]]:
        async def send(batch: list[Any]) -> float:
            if not self.parts.forward_logs:
                return 0.0
            return float(await controller.endpoint("take_logs").call_one(self.parts.info.node, batch))

        return send

    def _lease_event(self, event: leases.Event) -> None:
        if self._lease is None or self._lease.fenced is not None:
            return
        for effect in leases.step(self._lease, event, self.loop.time()):
            if isinstance(effect, Fence):
                self._finish(effect)
            elif isinstance(effect, leases.Suspect):
                logger.warning("no beat was answered by the controller for %.1f s", effect.silence_s)
        # Not with the next beat: the node is somebody else's soon after the lease is over.
        due, timer = self._lease.next_tick, self._lease_timer
        if self._lease.fenced is None and (timer is None or due < timer.when()):
            if timer is not None:
                timer.cancel()
            self._lease_timer = self.loop.call_at(due, self._on_lease_timer)

    def _on_lease_timer(self) -> None:
        """Often too early, because the lease was renewed meanwhile: one timer each few seconds, and not one a beat."""
        self._lease_timer = None
        self._lease_event(Tick())

    def _finish(self, over: Fence | MilesError) -> None:
        """The first reason counts; a later one that allows no grace takes what is left of it."""
        if not self._over.done():
            self._over.set_result(over)
        elif not self._graceless and not (isinstance(over, Fence) and over.orderly):
            self._graceless = True
            if self._ending:
                why = over.reason if isinstance(over, Fence) else over.what
                logger.warning("what still runs gets no grace any more: %s", why)
                self._order_the_end(why, orderly=False)


def _controller_lost() -> ControllerLost:
    return ControllerLost(
        "this agent has left the run",
        evidence="its lease ended or the controller said goodbye",
        advice="Look at the controller's log for the reason.",
        may_have_run=True,
    )
