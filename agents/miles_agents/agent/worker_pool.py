"""The workers of one agent: started, greeted, watched, ended; and the link that they dial.

Consumes: specs to start, orders to end, workers' envelopes and beats, exits. Produces: envelopes for the switch,
reports to the controller (``worker_exited``, ``worker_silent``, ``worker_heard``). Invariants: a worker is known by
its token; what it sends carries its own address or is dropped; its death is told exactly once, after everything that
it had sent was read, and only when nothing of it runs any more does its name become free.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from typing import TYPE_CHECKING, Any

from miles_agents.agent import worker_ending, worker_life
from miles_agents.agent.background import Background
from miles_agents.agent.log_forward import LogForwarder
from miles_agents.agent.logs import last_words
from miles_agents.agent.process_exit import Exit
from miles_agents.agent.starter import WorkerProcess
from miles_agents.agent.worker_errors import advice_on, given_up, never_ready, still_there
from miles_agents.agent.worker_facts import known_facts
from miles_agents.agent.worker_life import Dead, Exited, Greeted, Heard, Kill, Ready, Silent, Started, StopAsked
from miles_agents.errors import MilesError
from miles_agents.rpc.context import outside_of_calls
from miles_agents.rpc.errors import ControllerLost, NoSuchActor, StaleHandle, WorkerDied
from miles_agents.rpc.future import CallFuture
from miles_agents.rpc.mesh import ActorMesh
from miles_agents.rpc.switch import Hop
from miles_agents.wire.envelope import Address, Envelope, Target
from miles_agents.wire.link import LinkAcceptor
from miles_agents.wire.link_handlers import Admission, Refusal
from miles_agents.wire.peer import Peer
from miles_agents.wire.turns import current_turn
from miles_agents.worker.spec import Birth, WorkerSpec

if TYPE_CHECKING:
    from miles_agents.agent.agent import Agent

logger = logging.getLogger(__name__)
LOG_TAIL_LINES = 50
_DRAIN_S = 0.2
_PREDECESSOR_S = 30.0
_REMEMBERED_DEATHS = 1000


class Worker:
    """One worker of this agent. Also the hop to it."""

    answers_for_itself = False

    def __init__(self, spec: WorkerSpec, life: worker_life.WorkerLife, log_path: Any) -> None:
        self.spec = spec
        self.address = Address(spec.mesh, spec.rank, spec.incarnation)
        self.token = secrets.token_hex(16)
        self.life = life
        self.log_path = log_path
        self.peer: Peer | None = None
        self.process: WorkerProcess | None = None
        self.facts: dict[str, Any] = {}
        self.dead: WorkerDied | None = None
        self.heard_until = -math.inf
        """Loop time up to which its messages are no news of its life."""
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[str] = loop.create_future()
        self.begun = asyncio.Event()
        """The process executes, or never will."""
        self.starting: asyncio.Task[WorkerProcess] | None = None
        self.drained = asyncio.Event()
        self.ending: asyncio.Task[None] | None = None
        self.kill_at = math.inf
        """Loop time at which the grace of ``ending`` is over."""
        self.killed_at = math.inf
        """Loop time at which ``ending`` was through."""
        self.left: tuple[str, ...] = ()
        """What of it could not be killed."""
        self._waiting: list[Envelope] = []

    def send(self, envelope: Envelope) -> None:
        """Pass on a message; one that comes before HELLO waits for it."""
        if self.peer is None:
            self._waiting.append(envelope)
        else:
            self.peer.send(envelope)

    def greet(self, peer: Peer) -> None:
        """The worker said HELLO."""
        self.peer = peer
        waiting, self._waiting = self._waiting, []
        for envelope in waiting:
            peer.send(envelope)


class WorkerPool:
    """See the module's docstring."""

    def __init__(self, agent: Agent, controller: ActorMesh, logs: LogForwarder) -> None:
        self.agent = agent
        self.logs = logs
        self.tasks: Background | None = None
        self._controller = controller
        self._loop = asyncio.get_running_loop()
        self._workers: dict[tuple[int, int], Worker] = {}
        self._by_token: dict[str, Worker] = {}
        self._by_peer: dict[Peer, Worker] = {}
        self._deaths: dict[Address, WorkerDied] = {}
        self._leaving = ""
        self.link = LinkAcceptor(self)
        self.link.attach(agent.parts.accept)

    # -- starting and ending ---------------------------------------------------------------------------------

    async def start(self, spec: WorkerSpec) -> dict[str, Any]:
        """Start a worker and wait until it can be called.

        Raises:
            CannotStart: it cannot be executed.
            WorkerNeverReady: it ended, or took too long, before it said hello.
            ControllerLost: this agent is about to leave the run.
        """
        await self._wait_for_burial(spec)
        if self._leaving:
            raise too_late(spec.label, self._leaving)
        timings = self.agent.timings
        life = worker_life.begin(
            self._loop.time(),
            start_timeout_s=spec.start_timeout_s,
            beat_s=timings.beat_s,
            suspect_s=timings.suspect_s,
            stopped_timeout_s=spec.stopped_timeout_s,
        )
        log_path = self.agent.parts.log_dir / f"{spec.mesh_name}-{spec.rank}.{spec.incarnation}.log"
        worker = Worker(spec, life, log_path)
        self._workers[spec.mesh, spec.rank] = worker
        self._by_token[worker.token] = worker
        own = self.agent.address
        birth = Birth(
            spec,
            self.link.transport.address,
            (own.rank, own.incarnation),
            worker.token,
            self.agent.parts.info.node,
            timings,
            self.agent.store_path,
        )
        worker.starting = self._loop.create_task(self.agent.parts.starter.start(birth, log_path))
        try:
            worker.process = await worker.starting
        except BaseException:
            self._forget(worker)
            worker.gone.set_result("never started")
            if worker.life.state == "stopping" and worker.starting.cancelled():
                raise given_up(worker) from None
            raise
        finally:
            worker.begun.set()
        self.logs.add(spec.mesh_name, spec.rank, log_path, self._loop.time())
        worker.process.exited.add_done_callback(lambda exited: self._on_exit(worker, exited))
        self._step(worker, Started(worker.process.pid))
        await worker.ready
        return {"pid": worker.process.pid, "log": str(log_path)}

    async def _wait_for_burial(self, spec: WorkerSpec) -> None:
        """A predecessor whose death was told still has to go: what it left, its GPU memory for one."""
        deadline = self._loop.time() + _PREDECESSOR_S
        while (before := self._workers.get((spec.mesh, spec.rank))) is not None:
            if before.dead is None or self._loop.time() >= deadline:
                raise still_there(before)
            await asyncio.wait([before.gone], timeout=deadline - self._loop.time())

    async def end(self, worker: Worker, why: str, grace_s: float) -> str:
        """End a worker and everything below it; returns what was done, once it is done.

        Raises:
            WorkerWouldNotDie: something of it still runs.
        """
        self._step(worker, StopAsked(why))
        self._begin_end(worker, grace_s)
        return await worker_ending.wait_gone(worker)

    def _begin_end(self, worker: Worker, grace_s: float) -> None:
        """An order with less grace than the one that is carried out takes its place; any other changes nothing."""
        assert self.tasks is not None
        if worker.life.state == "dead" and worker.ending is not None:
            return  # its burial ends what it left
        kill_at = self._loop.time() + grace_s
        if worker.ending is not None and not worker.ending.done():
            if kill_at >= worker.kill_at:
                return
            worker.ending.cancel()
        worker.kill_at = kill_at
        worker.ending = self.tasks.create_task(self._end(worker, grace_s), name=f"end {worker.spec.label}")

    async def _end(self, worker: Worker, grace_s: float) -> None:
        if worker.starting is not None:
            worker.starting.cancel()  # it may wait for a zygote
        await worker.begun.wait()  # what is being executed right now cannot be killed yet, and must not be forgotten
        try:
            if worker.process is not None:
                killed = await worker.process.kill(grace_s)
                worker.left = killed.survivors
                logger.log(
                    logging.ERROR if killed.survivors else logging.INFO, "%s: %s", worker.spec.label, killed.text
                )
        except Exception as error:  # boundary: an ending that fails is reported as one that left something
            logger.exception("%s could not be ended", worker.spec.label)
            worker.left = (f"pid {worker.life.pid}: ending it failed: {error!r}",)
        worker.killed_at = self._loop.time()

    def end_all(self, why: str, *, orderly: bool) -> None:
        """End every worker and start none any more; ``orderly`` gives them their grace. May be said again."""
        self._leaving = why
        for worker in list(self._workers.values()):
            self._step(worker, StopAsked(why))
            self._begin_end(worker, worker.spec.term_grace_s if orderly else 0.0)

    async def wait_all_dead(self) -> list[str]:
        """After ``end_all``: until no worker is left but what cannot be killed, which is returned, for people."""
        return await worker_ending.wait_all(list(self._workers.values()))

    def close(self) -> None:
        """Leave the network, let go of the logs."""
        self.link.close()
        self.logs.close()

    def find(self, mesh: int, rank: int, incarnation: int) -> Worker:
        """The living worker of that address. Raises StaleHandle, WorkerDied or NoSuchActor."""
        target = Target(rank, incarnation, 0)
        worker = self._workers.get((mesh, rank))
        if worker is not None and worker.spec.incarnation == incarnation:
            return worker
        raise self.why_gone(mesh, target) or NoSuchActor(
            f"rank {rank} of mesh {mesh} (incarnation {incarnation}) does not run on this node",
            evidence=f"node {self.agent.parts.info.node} runs {[w.spec.label for w in self._workers.values()]}",
            advice="Get a fresh handle with lookup(name).",
        )

    def label_of(self, token: str) -> str | None:
        """The living worker with that token, for people."""
        worker = self._by_token.get(token)
        return None if worker is None or worker.dead is not None else worker.spec.label

    # -- routing ---------------------------------------------------------------------------------------------

    def resolve(self, mesh: int, target: Target) -> Hop | MilesError | None:
        """The way to a worker of this node; None if it is not here."""
        worker = self._workers.get((mesh, target.rank))
        if worker is None:
            return self._deaths.get(Address(mesh, target.rank, target.incarnation))
        if worker.spec.incarnation != target.incarnation:
            return self.why_gone(mesh, target) or self.stale(mesh, target)
        if worker.dead is not None:
            return worker.dead
        return worker

    def find_living(self, mesh: int, rank: int) -> Worker | None:
        """The worker of this node in that place, if it is connected and alive."""
        worker = self._workers.get((mesh, rank))
        return worker if worker is not None and worker.peer is not None and worker.dead is None else None

    def knows(self, mesh: int, rank: int, incarnation: int) -> bool:
        """Whether a worker of this node is or was in that place."""
        return (mesh, rank) in self._workers or (mesh, rank, incarnation) in self._deaths

    def why_gone(self, mesh: int, target: Target) -> WorkerDied | None:
        """How a worker of this node ended, if it is remembered."""
        return self._deaths.get(Address(mesh, target.rank, target.incarnation))

    def stale(self, mesh: int, target: Target) -> StaleHandle:
        """The refusal of a message for an earlier life."""
        return StaleHandle(
            f"rank {target.rank} of mesh {mesh} is not incarnation {target.incarnation} any more",
            evidence="the process that the handle names was replaced",
            advice="Get a fresh handle with lookup(name).",
            may_have_run=False,
        )

    # -- what the link says ----------------------------------------------------------------------------------

    def admit(self, hello: dict[str, Any], user_id: str, session_id: int) -> Admission | Refusal:
        """A worker dials for the first time."""
        worker = self._by_token.get(str(hello.get("token")))
        if worker is None:
            return Refusal("no worker with this token is expected here")
        if worker.peer is not None:
            return Refusal("this worker has said hello before, in another session")
        return Admission(worker.token)

    def on_peer_up(self, peer: Peer, *, resumed: bool) -> None:
        """A worker is connected."""
        worker = self._by_peer.get(peer)
        if worker is None:
            worker = self._by_token[peer.name]
            self._by_peer[peer] = worker
            worker.greet(peer)
        worker.drained.clear()
        self._step(worker, Greeted())

    def on_peer_down(self, peer: Peer) -> None:
        """A hint; the pidfd knows better. All that the worker had sent was read."""
        worker = self._by_peer.get(peer)
        if worker is not None:
            worker.drained.set()

    def on_envelope(self, peer: Peer, envelope: Envelope) -> None:
        """From a worker to anybody."""
        worker = self.heard(peer)
        if worker is None or envelope.source != worker.address:
            self.link.stats.drop("message in another's name")
            return
        self.agent.switch.route(envelope)

    def heard(self, peer: Peer) -> Worker | None:
        """The worker that has said something; its life is told, unless it was a moment ago."""
        worker = self._by_peer.get(peer)
        if worker is not None and peer.last_heard >= worker.heard_until:
            worker.heard_until = peer.last_heard + self.agent.timings.beat_s / 4
            self._step(worker, Heard())
        return worker

    def on_beat(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        """A worker lives."""
        worker = self._by_peer.get(peer)
        if worker is not None:
            worker.facts = known_facts(facts)
            self._step(worker, Heard())
        return {}

    def on_answer(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> None:
        """Agents do not beat towards workers."""

    def on_goodbye(self, peer: Peer, reason: str) -> None:
        """A worker ends as it was told to."""
        worker = self._by_peer.get(peer)
        if worker is not None:
            self._step(worker, StopAsked(reason))

    # -- time and death --------------------------------------------------------------------------------------

    def tick(self) -> None:
        """On every beat of the agent."""
        for worker in list(self._workers.values()):
            if worker.process is not None:
                self._step(worker, worker_life.Tick(worker.process.state()))

    def facts(self) -> list[list[Any]]:
        """What the agent's beat says of its workers: [mesh, rank, incarnation, pid, state, facts]."""
        return [
            [w.spec.mesh, w.spec.rank, w.spec.incarnation, w.life.pid, w.life.state, w.facts]
            for w in self._workers.values()
        ]

    def _step(self, worker: Worker, event: worker_life.Event) -> None:
        worker.life, effects = worker_life.step(worker.life, event, self._loop.time())
        for effect in effects:
            match effect:
                case Ready():
                    if not worker.ready.done():
                        worker.ready.set_result(None)
                case Silent(silence_s, evidence):
                    self._report("worker_silent", worker, silence_s, evidence)
                case Heard():
                    self._report("worker_heard", worker)
                case Kill(why):
                    logger.warning("%s: %s", worker.spec.label, why)
                    self._begin_end(worker, 0.0)
                case Dead():
                    assert self.tasks is not None
                    self.tasks.create_task(self._bury(worker, effect), name=f"bury {worker.spec.label}")

    def _on_exit(self, worker: Worker, exited: asyncio.Future[Exit]) -> None:
        how = "exit status unknown" if exited.cancelled() else exited.result().describe()
        self._step(worker, Exited(how))

    async def _bury(self, worker: Worker, death: Dead) -> None:
        """Read what it still said, answer for it, tell the controller, end what it left behind.

        A step that fails is logged, and the others are made.
        """
        spec = worker.spec
        if worker.peer is not None and worker.peer.is_up:
            try:
                async with asyncio.timeout(_DRAIN_S):
                    await worker.drained.wait()
            except TimeoutError:
                logger.debug("%s: its link was not seen to close", spec.label)
        tail: list[str] = []
        with self.link.boundary(f"reading the last lines of {spec.label}"):
            tail = self.logs.finish(spec.mesh_name, spec.rank, self._loop.time())[-LOG_TAIL_LINES:]
        error = self._death_of(worker, death, tail)
        worker.dead = error
        self._remember(worker.address, error)
        with current_turn().together():  # so that whoever hears the error finds the controller's status up to date
            with self.link.boundary(f"answering for {spec.label}"):
                self.agent.switch.receivers_died({worker.address}, error)
            with self.link.boundary(f"telling the death of {spec.label}"):
                self._report("worker_exited", worker, [death.cause, death.expected, tail])
        if not worker.ready.done():
            worker.ready.set_exception(never_ready(worker, death, tail))
            worker.ready.exception()  # looked at: start() may have been cancelled meanwhile
        await self._clear_away(worker)
        self._forget(worker)
        worker.gone.set_result(death.cause)

    async def _clear_away(self, worker: Worker) -> None:
        spec = worker.spec
        with self.link.boundary(f"closing the session of {spec.label}"):
            if worker.peer is not None:
                self.link.end_session(worker.peer)
        with self.link.boundary(f"ending what {spec.label} left"):
            if worker.process is not None:
                swept = await worker.process.sweep()
                worker.left = swept.survivors
                if swept.survivors:
                    logger.error("%s has ended but leaves something: %s", spec.label, swept.text)
        with self.link.boundary(f"telling the store of the end of {spec.label}"):
            if self.agent.store is not None:
                self.agent.store.worker_gone(worker.token)
        with self.link.boundary(f"releasing the ports of {spec.label}"):
            if self.agent.parts.ports is not None:
                self.agent.parts.ports.release(spec.label)

    def _death_of(self, worker: Worker, death: Dead, tail: list[str]) -> WorkerDied:
        node, pid = self.agent.parts.info.node, worker.life.pid
        return WorkerDied(
            f"{worker.spec.label} on {node}, pid {pid}, died: {death.cause}",
            evidence=f"its last lines ({worker.log_path}):\n{last_words(tail)}",
            advice=advice_on(death.cause),
            actor=worker.spec.label,
            node=node,
            pid=pid,
            exit=death.cause,
            may_have_run=True,
        )

    def _remember(self, address: Address, error: WorkerDied) -> None:
        self._deaths[address] = error
        while len(self._deaths) > _REMEMBERED_DEATHS:
            del self._deaths[next(iter(self._deaths))]

    def _forget(self, worker: Worker) -> None:
        self._workers.pop((worker.spec.mesh, worker.spec.rank), None)
        self._by_token.pop(worker.token, None)
        if worker.peer is not None:
            self._by_peer.pop(worker.peer, None)

    def _report(self, method: str, worker: Worker, *details: Any) -> None:
        spec = worker.spec
        report = self._controller.endpoint(method).broadcast
        # Often begun in the context of the order that started the worker: its deadline is not the report's.
        told = outside_of_calls().run(report, spec.mesh, spec.rank, spec.incarnation, *details)
        told.add_done_callback(nobody_cares)


def nobody_cares(told: CallFuture[None]) -> None:
    """For reports: they fail only when this life leaves the run."""
    told.exception()


def too_late(label: str, why: str) -> ControllerLost:
    """The refusal of a start while everything is being ended."""
    return ControllerLost(
        f"{label} was not started: the agent is about to leave the run",
        evidence=why,
        advice="Start it on another node, or wait until the node has joined again.",
        may_have_run=False,
    )
