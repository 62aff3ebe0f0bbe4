"""The runtime inside a worker: link to the agent, RPC node, actor host, beats, and the fence.

It lives on one event loop (the I/O thread's; in simulations everybody's) and knows nothing of processes: what to do
when the worker has to end is handed in as ``leave``. Consumes: the agent's envelopes and answers to beats. Produces:
beats with facts, answers, calls. Waits for: the agent, for as long as the lease lasts; then it fences itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from miles_agents.agent import lease as leases
from miles_agents.agent.lease import BeatAnswered, BeatSent, Fence, Lease, LinkDown, LinkUp, Tick
from miles_agents.rpc.actor import EndpointInfo, Thread
from miles_agents.rpc.context import ActorContext
from miles_agents.rpc.guard import obeying
from miles_agents.rpc.host import ActorHost, Executors
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Extent, Shape
from miles_agents.wire.envelope import AGENT_MESH, CONTROLLER_MESH, Address, Envelope
from miles_agents.wire.link import LinkDialer
from miles_agents.wire.link_handlers import Refusal
from miles_agents.wire.peer import Peer
from miles_agents.wire.transport import Transport
from miles_agents.worker.construct import construct
from miles_agents.worker.spec import Birth

Leave = Callable[[str], None]
"""End this worker now; the reason is for its log."""


class WorkerRuntime:
    """See the module's docstring. Create and use it on its event loop."""

    def __init__(self, birth: Birth, executors: Executors, leave: Leave) -> None:
        spec = birth.spec
        self.loop = asyncio.get_running_loop()
        self.birth = birth
        self._leave = leave
        self._left = False
        self.link = LinkDialer(self, random.SystemRandom().getrandbits(63), self._hello)
        address = Address(spec.mesh, spec.rank, spec.incarnation)
        self.node = RpcNode(address, spec.label, self.link.peer.send, libraries="import", routes_from_any_thread=True)
        self.host = ActorHost(self.node, executors)
        info = MeshInfo(CONTROLLER_MESH, "controller", {0: spec.controller_incarnation})
        controller = ActorMesh(info, Shape.of(controller=1), self.node)
        rank, incarnation = birth.agent
        agent_info = MeshInfo(AGENT_MESH, f"agent of {birth.node}", {rank: incarnation})
        agent = ActorMesh(agent_info, Shape(Extent((), ()), (rank,)), self.node)
        self.context = ActorContext(
            self.node, spec.run_id, spec.mesh_name, spec.rank, spec.shape, spec.incarnation,
            birth.node, spec.devices, spec.local_rank, dict(spec.facts), controller, agent,
            (birth.store, birth.token) if birth.store else None,
        )  # fmt: skip
        self.host.context = self.context
        self._executors = executors
        timings = birth.timings
        self._lease = Lease.start(
            self.loop.time(),
            fence_s=timings.fence_s,
            suspect_s=timings.suspect_s,
            kind="observed",
            suspend_gap_s=2 * timings.beat_s,
            link_up=False,
        )
        self._last_tick = self.loop.time()
        self._lag_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        master = Address(CONTROLLER_MESH, 0, spec.controller_incarnation)
        self._bind("__construct__", "main", self._construct, master)
        self._bind("__close__", "main", self._close_actor, master)
        self._bind("__exit__", "io", self._exit, master)
        self._bind("__stack__", "io", thread_stacks, master, Address(AGENT_MESH, *birth.agent))

    def start(self, dial: Callable[[Any], Transport]) -> None:
        """Dial the agent and begin to beat. The transport takes messages from any thread."""
        self.link.attach(dial)
        self._tick()

    def close(self) -> None:
        """Leave the network; nothing runs afterwards."""
        self._left = True
        if self._timer is not None:
            self._timer.cancel()
        self.link.close()

    # -- endpoints of every worker ---------------------------------------------------------------------------

    def _bind(self, name: str, thread: Thread, order: Callable[..., Any], *masters: Address) -> None:
        self.host.bind(EndpointInfo(name, thread, False, False), obeying(name, order, masters))

    def _construct(self, where: dict[str, str], args: list[Any], kwargs: dict[str, Any]) -> list[list[Any]]:
        return construct(self.host, self.birth.spec.preload or (), where, args, kwargs)

    def _close_actor(self) -> None:
        if self.host.actor is not None:
            self.host.actor.close()

    def _exit(self, reason: str) -> None:
        # The answer has to leave first; the goodbye follows it on the same connection.
        self.loop.call_soon(self._say_goodbye, reason)

    def _say_goodbye(self, reason: str) -> None:
        self.link.peer.say_goodbye(reason)
        self.loop.call_later(0.05, self._leave_once, reason)

    # -- what the link says ----------------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        spec = self.birth.spec
        return {
            "token": self.birth.token,
            "mesh": spec.mesh,
            "rank": spec.rank,
            "incarnation": spec.incarnation,
            "pid": os.getpid(),
        }

    def on_welcome(self, grant: dict[str, Any]) -> None:
        """The agent knows us."""

    def on_refused(self, refusal: Refusal) -> None:
        """The agent does not want this life any more."""
        self._leave_once(f"the agent refuses this worker: {refusal.reason}")

    def on_envelope(self, peer: Peer, envelope: Envelope) -> None:
        """A message for this worker; one for an earlier life is nobody's."""
        if envelope.mesh == self.node.address.mesh and envelope.targets[1] == self.node.address.incarnation:
            self.node.deliver(envelope)
        else:
            self.link.stats.drop("message for another incarnation")

    def on_peer_up(self, peer: Peer, *, resumed: bool) -> None:
        """Connected."""
        self._lease_event(LinkUp())

    def on_peer_down(self, peer: Peer) -> None:
        """Not connected; the lease decides."""
        self._lease_event(LinkDown())

    def on_beat(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        """Agents do not beat; they answer."""
        return {}

    def on_answer(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> None:
        """The agent answered a beat: the lease is renewed."""
        self._lease_event(BeatAnswered(beat_id))

    def on_goodbye(self, peer: Peer, reason: str) -> None:
        """The agent ends."""
        self._leave_once(f"the agent said goodbye: {reason}")

    # -- beats -----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._left:
            return
        now = self.loop.time()
        beat_s = self.birth.timings.beat_s
        self._lag_s = max(0.0, now - self._last_tick - beat_s)
        self._last_tick = now
        self._lease_event(Tick())
        self._lease_event(BeatSent(self.link.beat(self._facts())))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(beat_s, self._tick)

    def _facts(self) -> dict[str, Any]:
        requests = self.host.inbox.snapshot()
        running = [r for r in requests if r.stage.value == "running"]
        oldest = min(running, key=lambda r: r.arrived_at, default=None)
        return {
            "progress": self.host.main_progress,
            "queued": len(requests) - len(running),
            "running": len(running),
            "call": oldest.endpoint.name if oldest is not None else "",
            "call_age_s": self.loop.time() - oldest.arrived_at if oldest is not None else 0.0,
            "lag_s": self._lag_s,
        }

    def _lease_event(self, event: leases.Event) -> None:
        if self._left:
            return
        for effect in leases.step(self._lease, event, self.loop.time()):
            if isinstance(effect, Fence):
                self._leave_once(f"fenced: {effect.reason}")

    def _leave_once(self, reason: str) -> None:
        if not self._left:
            self.close()
            self._leave(reason)


def thread_stacks() -> str:
    """The Python stack of every thread of this process, main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    parts = []
    for ident in sorted(frames, key=lambda i: (i != main, i)):
        stack = "".join(traceback.format_stack(frames[ident]))
        parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)
