"""Meshes that this controller spawned: their ranks, their policy, their end.

Consumes: exits and silence that agents report, the clock, orders of the owner. Produces: started, restarted and ended
workers; events; current handles. Waits for: agents, each order with a deadline or until the node is dead. Invariants:
each death of a rank reaches the policy once, unless its node was dismissed; every respawn has a new incarnation; when
``stop`` returns, nothing of the mesh runs (on nodes that live: confirmed by their agents; on dead ones: fenced); what
is not confirmed keeps its devices, and the mesh its name.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from miles_agents.agent.zygote_profile import profile_environment
from miles_agents.errors import MilesError
from miles_agents.rpc.errors import WorkerDied
from miles_agents.rpc.mesh import ActorMesh, MeshInfo, endpoint_from_plain
from miles_agents.rpc.shape import Extent, Shape
from miles_agents.wire.envelope import Address
from miles_agents.worker.spec import WorkerSpec, pack_specs
from miles_controller import policy as policies
from miles_controller.fabric import Node, WorkerRoute
from miles_controller.owned_mesh import MeshFailed, OwnedMesh
from miles_controller.placement import InfeasiblePlacement, Slot
from miles_controller.policy import FailMesh, KillRank, Policy, ReportHung, RespawnRank, Supervision
from miles_controller.rank_end import NotEnded, describe, end_ranks, not_ended

if TYPE_CHECKING:
    from miles_controller.controller import Controller


@dataclass(slots=True)
class Rank:
    """One rank of a mesh, over all its lives."""

    rank: int
    slot: Slot
    incarnation: int = 0
    pid: int = 0
    log: str = ""
    state: str = "starting"
    evidence: str = ""
    dismissed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    facts_at: float = 0.0

    def facts_now(self, now: float) -> dict[str, Any]:
        """Its last facts; a call that it was in has grown older since, as agents tell changes only."""
        age_s = self.facts.get("call_age_s") if self.facts.get("call") else None
        return self.facts if age_s is None else {**self.facts, "call_age_s": age_s + now - self.facts_at}


@dataclass(frozen=True, slots=True)
class SpawnPlan:
    """All that is needed to make a rank, again and again."""

    where: dict[str, str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    env: Mapping[str, str]
    rank_env: Callable[[int], Mapping[str, str]] | None
    sys_path: tuple[str, ...]
    start_timeout_s: float
    term_grace_s: float
    bind_numa: bool
    preload: tuple[str, ...] | None = None
    start_method: str = "auto"


class MeshSupervisor:
    """Starts, watches, restarts and ends the ranks of one mesh."""

    def __init__(
        self, controller: Controller, mesh: int, name: str, *, shape: Shape, slots: Sequence[Slot], plan: SpawnPlan,
        policy: Policy,
    ) -> None:  # fmt: skip
        self.controller = controller
        self.mesh = mesh
        self.name = name
        self.shape = shape
        self.plan = plan
        self.policy = policy
        self.ranks = [Rank(index, slot) for index, slot in enumerate(slots)]
        self.info = MeshInfo(mesh, name, {})
        self.handle = OwnedMesh(self.info, shape, controller.fabric.node)
        self.handle._supervisor = self
        self.loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[MeshFailed | None] = self.loop.create_future()
        self.stopping = False
        self._supervision: Supervision | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._respawns: dict[int, asyncio.Task[None]] = {}
        self._ended = False
        self._unconfirmed: set[int] = set()

    @property
    def has_started(self) -> bool:
        """Whether all ranks were constructed once: from then on there are handles."""
        return self._supervision is not None

    # -- starting --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all ranks and construct their actors; all or nothing.

        Raises:
            CannotStart, WorkerNeverReady: a process did not come up. RemoteError: a constructor raised.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for node, ranks in _by_node(self.ranks).items():
                    tasks.create_task(self._start_processes(node, ranks))
            self._note_endpoints(await self._construct(self.ranks))
        except BaseException as error:
            await asyncio.shield(self._give_up())
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        self._supervision = Supervision.start(self.policy, self.info.incarnations)
        for rank in self.ranks:
            if rank.state == "dead":  # died between its construction and now
                self._step(policies.RankDied(rank.rank, rank.incarnation, rank.evidence))
            else:
                rank.state = "up"

    def _environment(self, rank: Rank) -> dict[str, str]:
        plan = self.plan
        own = plan.rank_env(rank.rank) if plan.rank_env else {}
        return {**self.controller.forwarded_env, **plan.env, **own}

    async def _start_processes(self, node_name: str, ranks: Sequence[Rank]) -> None:
        """One order for all ranks of a node: a mesh may have thousands."""
        controller = self.controller
        node = controller.fabric.find(node_name)
        if node is None:
            raise MeshFailed(
                f"{self.name}[{ranks[0].rank}] cannot start: node {node_name} is gone",
                evidence=controller.fabric.membership.describe(node_name, self.loop.time()),
                advice="Bring the node back, or place the mesh again without it.",
            )
        # Before anything is begun: the owner's function may raise. Those with equal profiles one zygote can make.
        envs = [self._environment(rank) for rank in ranks]
        profiles = [profile_environment(env) for env in envs]
        alike = Counter(profiles)
        for rank in ranks:
            rank.incarnation = controller.next_incarnation()
            rank.state, rank.evidence, rank.pid, rank.dismissed, rank.facts = "starting", "", 0, False, {}
            address = Address(self.mesh, rank.rank, rank.incarnation)
            controller.fabric.add_worker(WorkerRoute(address, node, f"{self.name}[{rank.rank}]"))
        lives = zip(ranks, envs, profiles, strict=True)
        specs = [self._spec(rank, env, alike[profile]) for rank, env, profile in lives]
        agent = controller.fabric.agent(node).options(timeout_s=self.plan.start_timeout_s + 10.0)
        started = await agent.endpoint("start_workers").call_one(pack_specs(specs))
        for rank, born in zip(ranks, started, strict=True):
            rank.pid, rank.log = born["pid"], born["log"]

    def _spec(self, rank: Rank, env: dict[str, str], siblings: int) -> WorkerSpec:
        plan, controller = self.plan, self.controller
        return WorkerSpec(
            run_id=controller.run_id,
            mesh=self.mesh,
            mesh_name=self.name,
            rank=rank.rank,
            incarnation=rank.incarnation,
            controller_incarnation=controller.fabric.node.address.incarnation,
            shape=self.shape,
            devices=rank.slot.devices,
            local_rank=rank.slot.local_rank,
            env=env,
            sys_path=plan.sys_path,
            start_timeout_s=plan.start_timeout_s,
            term_grace_s=plan.term_grace_s,
            bind_numa=plan.bind_numa,
            preload=plan.preload,
            start_method=plan.start_method,
            siblings=siblings,
            stopped_timeout_s=self.policy.stopped_timeout_s,
        )

    async def _construct(self, ranks: Sequence[Rank]) -> list[Any]:
        """Make the actors of processes that are up, and only then let callers see them. Returns the endpoints."""
        plan = self.plan
        born = {rank.rank: rank.incarnation for rank in ranks}
        shape = self.shape
        if len(ranks) < len(self.shape):
            shape = Shape(Extent.of(ranks=len(ranks)), tuple(born))
        mesh = ActorMesh(MeshInfo(self.mesh, self.name, born), shape, self.controller.fabric.node)
        timed = mesh.options(timeout_s=plan.start_timeout_s)
        made = await timed.endpoint("__construct__").call(plan.where, list(plan.args), plan.kwargs)
        self.info.incarnations.update(born)
        endpoints: list[Any] = made[0]
        return endpoints

    def _note_endpoints(self, plain: list[Any]) -> None:
        self.info.endpoints = {info.name: info for info in map(endpoint_from_plain, plain)}

    async def _give_up(self) -> None:
        self._stop_supervision()
        errors = await self._end_ranks("the mesh did not come up", 0.0)
        self._leave_if_gone(errors)
        if errors:
            self.controller.events.emit("mesh_not_ended", self.name, self._not_ended(errors).what)

    # -- ending ----------------------------------------------------------------------------------------------

    async def stop(self, *, grace_s: float | None, close_actors: bool) -> None:
        """End all ranks, confirmed. Idempotent. Raises NotEnded if some may live on; the others have ended."""
        self._stop_supervision()
        try:
            alive = [rank for rank in self.ranks if rank.state in ("up", "silent")]
            if close_actors and alive and not self._ended:
                timeout_s = self.plan.term_grace_s if grace_s is None else grace_s
                await self._close_actors(alive, max(timeout_s, 0.1))
            errors = await self._end_ranks("the mesh is stopped", grace_s)
        finally:
            self._settle(None)
        self._leave_if_gone(errors)
        if errors:
            raise self._not_ended(errors)

    def on_dismissed(self, nodes: Collection[str]) -> None:
        """These nodes are sent away: what ends there was asked to. A mesh that has no other nodes is stopped."""
        for rank in self.ranks:
            rank.dismissed = rank.dismissed or (rank.slot.node in nodes and rank.state in ("up", "silent"))
        if self.has_started and all(rank.slot.node in self.controller.fabric.dismissed for rank in self.ranks):
            self._stop_supervision()
            self._settle(None)
            self._leave_if_gone({rank.rank for rank in self.ranks if rank.state != "dead"})

    def _stop_supervision(self) -> None:
        self.stopping = True
        for task in self._respawns.values():
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _leave_if_gone(self, unconfirmed: Collection[int]) -> None:
        """Give everything back, once nothing may live on any more."""
        first, self._ended = not self._ended, True
        self._unconfirmed = set(unconfirmed)
        if self._unconfirmed or (not first and self.controller.supervisor_of(self.mesh) is not self):
            return
        for rank in self.ranks:
            self.controller.fabric.drop_worker(self.mesh, rank.rank)
        self.controller.mesh_left(self)
        if self.has_started:
            self.controller.events.emit("mesh_stopped", self.name, "all ranks have ended")

    def _not_ended(self, reasons: Mapping[int, str]) -> NotEnded:
        return not_ended(self.name, reasons, {rank.rank: rank.slot.node for rank in self.ranks})

    def _settle(self, outcome: MeshFailed | None) -> bool:
        if self.failed.done():
            return False
        self.failed.set_result(outcome)
        return True

    async def _close_actors(self, alive: Sequence[Rank], timeout_s: float) -> None:
        # The dead ones refuse at once; which they are may change meanwhile.
        closing = self.handle.options(timeout_s=timeout_s, return_exceptions=True).endpoint("__close__").call()
        outcomes = list((await closing).values)
        for rank in alive:
            outcome = outcomes[rank.rank]
            if isinstance(outcome, Exception):
                self.controller.events.emit("close_failed", f"{self.name}[{rank.rank}]", describe(outcome))

    async def _end_ranks(self, why: str, grace_s: float | None) -> dict[int, str]:
        """Try all, whatever happens to some; returns those that are not confirmed to have ended, with the reason."""
        begun = [r for r in self.ranks if r.incarnation and (r.state != "dead" or r.rank in self._unconfirmed)]
        ends = (self._end_on(node, ranks, why, grace_s) for node, ranks in _by_node(begun).items())
        reasons: dict[int, str] = {}
        for part in await asyncio.gather(*ends):
            reasons.update(part)
        return reasons

    async def _end_on(self, node: str, ranks: Sequence[Rank], why: str, grace_s: float | None) -> dict[int, str]:
        lives = {rank.rank: rank.incarnation for rank in ranks}
        grace = self.plan.term_grace_s if grace_s is None else grace_s
        return await end_ranks(self.controller.fabric, node, self.mesh, lives, why, grace_s=grace)

    async def kill_rank(self, rank: int, why: str) -> None:
        """Kill one rank; the policy sees a death. Raises NotEnded."""
        reasons = await self._end_on(self.ranks[rank].slot.node, [self.ranks[rank]], why, 0.0)
        if reasons:
            raise self._not_ended(reasons)

    async def _kill_for_policy(self, rank: Rank, incarnation: int, why: str) -> None:
        """Kill a rank that the policy wants dead; it waits for the death, so it is told of one that came before."""
        if rank.incarnation != incarnation:
            return
        try:
            await self.kill_rank(rank.rank, why)
        except NotEnded as error:
            self._fail(f"{error.what}; it was to be killed: {why}", (error.evidence,))
        if rank.incarnation == incarnation and rank.state == "dead":
            self._step(policies.RankDied(rank.rank, incarnation, rank.evidence))

    # -- what agents report ----------------------------------------------------------------------------------

    def on_exit(self, rank_number: int, incarnation: int, cause: str) -> None:
        """A life of a rank ended."""
        rank = self.ranks[rank_number]
        if rank.incarnation != incarnation:
            return
        was_dead = rank.state == "dead"
        rank.state = "dead"
        if rank_number in self._unconfirmed:
            self._leave_if_gone(self._unconfirmed - {rank_number})
        if was_dead:
            return
        rank.evidence = cause
        if not self.stopping and not rank.dismissed:
            self._step(policies.RankDied(rank_number, incarnation, cause))

    def on_silent(self, rank_number: int, incarnation: int, silence_s: float, evidence: str) -> None:
        """A rank gives no sign of life."""
        rank = self.ranks[rank_number]
        if rank.incarnation == incarnation and rank.state in ("up", "silent") and not rank.dismissed:
            rank.state, rank.evidence = "silent", evidence
            since = self.loop.time() - silence_s
            self._step(policies.RankFrozen(rank_number, incarnation, since, evidence))

    def on_heard(self, rank_number: int, incarnation: int) -> None:
        """It does again."""
        rank = self.ranks[rank_number]
        if rank.incarnation == incarnation and rank.state == "silent":
            rank.state, rank.evidence = "up", ""
            self._step(policies.RankThawed(rank_number, incarnation))

    async def stack(self, rank: int) -> str:
        """All stacks of a rank's process."""
        return str(await self._ask_agent(rank, "worker_stack"))

    async def log_tail(self, rank: int, num_lines: int) -> list[str]:
        """The last lines of a rank's log."""
        return [str(line) for line in await self._ask_agent(rank, "worker_log", num_lines)]

    async def report_overdue(self, rank: int, method: str, age_s: float) -> None:
        """A call is much older than usual: tell, with the stack of who owes the answer."""
        try:
            stack = await self.stack(rank)
        except MilesError as error:
            stack = error.what
        text = f"{method} has not answered for {age_s:.0f} s"
        self.controller.events.emit("call_overdue", f"{self.name}[{rank}]", text, stack=stack)

    async def _ask_agent(self, rank: int, order: str, *args: Any) -> Any:
        there = self.ranks[rank]
        node = self.controller.fabric.find(there.slot.node)
        if node is None:
            route = self.controller.fabric.workers.get((self.mesh, rank))
            raise (route.dead if route is not None else None) or WorkerDied(f"{self.name}[{rank}] is gone")
        agent = self.controller.fabric.agent(node).options(timeout_s=10.0)
        return await agent.endpoint(order).call_one(self.mesh, rank, there.incarnation, *args)

    # -- policy ----------------------------------------------------------------------------------------------

    def _step(self, event: policies.Event) -> None:
        if self._supervision is None:
            return
        self._supervision, effects = policies.step(self._supervision, event, self.loop.time())
        for effect in effects:
            self._carry_out(effect)
        self._arm_timer()

    def _carry_out(self, effect: policies.Effect) -> None:
        match effect:
            case KillRank(rank, incarnation, reason):
                kill = self._kill_for_policy(self.ranks[rank], incarnation, reason)
                self.controller.background(kill, f"kill {self.name}[{rank}]")
            case RespawnRank(rank, at):
                task = self.controller.background(self._respawn(rank, at), f"respawn {self.name}[{rank}]")
                self._respawns[rank] = task
            case ReportHung(rank, incarnation, since, evidence):
                self.controller.background(
                    self._report_hung(rank, incarnation, since, evidence), f"stack of {self.name}[{rank}]"
                )
            case FailMesh(reason, causes):
                self._fail(reason, causes)

    async def _report_hung(self, rank: int, incarnation: int, since: float, evidence: str) -> None:
        try:
            stack = await self.stack(rank)
        except MilesError as error:
            stack = error.what
        silent_s = self.loop.time() - since
        text = f"silent for {silent_s:.1f} s: {evidence}"
        self.controller.events.emit("worker_silent", f"{self.name}[{rank}]", text, incarnation=incarnation, stack=stack)

    async def _respawn(self, rank_number: int, at: float) -> None:
        rank = self.ranks[rank_number]
        try:
            await asyncio.sleep(max(0.0, at - self.loop.time()))
            rank.slot = self.controller.meshes.slot_of(self.name, rank_number)
            await self._start_processes(rank.slot.node, [rank])
            await self._construct([rank])
        except Exception as error:  # noqa: BLE001  boundary: the owner's functions may raise anything
            await self._respawn_failed(rank, error)
            return
        finally:
            self._respawns.pop(rank_number, None)
        self._step(policies.RankStarted(rank_number, rank.incarnation))
        if rank.state == "dead":  # died between its construction and now
            self._step(policies.RankDied(rank_number, rank.incarnation, rank.evidence))
            return
        rank.state = "up"
        text = f"restarted as incarnation {rank.incarnation}, pid {rank.pid} on {rank.slot.node}"
        self.controller.events.emit("worker_restarted", f"{self.name}[{rank_number}]", text)

    async def _respawn_failed(self, rank: Rank, error: Exception) -> None:
        survivors = await self._end_on(rank.slot.node, [rank], "its respawn failed", 0.0)
        if survivors:  # a second life beside it is worse than none
            reason = f"rank {rank.rank} did not come back, and what was begun is not confirmed to have ended"
            self._fail(reason, (describe(error), *survivors.values()))
            return
        rank.state = "dead"
        self._step(policies.RespawnFailed(rank.rank, _full_story(error)))

    def _fail(self, reason: str, causes: tuple[str, ...]) -> None:
        for task in self._respawns.values():
            task.cancel()
        headline = reason.partition("\n")[0]
        error = MeshFailed(
            f"mesh {self.name} failed: {headline}",
            evidence="\n".join(causes),
            advice="Read the first cause and its log; spawn the mesh anew, or give it a policy that restarts.",
        )
        if self._settle(error):
            self.controller.events.emit("mesh_failed", self.name, headline, causes=list(causes))

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._supervision.next_tick() if self._supervision is not None else None
        if due is not None and not self.stopping:
            self._timer = self.loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._step(policies.Tick())

    def snapshot(self) -> dict[str, Any]:
        """For the status page."""
        return {
            "name": self.name,
            "shape": str(self.shape.extent),
            "failed": self.handle.failure.what if self.handle.failure is not None else "",
            "ranks": [
                {
                    "rank": r.rank, "node": r.slot.node, "devices": list(r.slot.devices), "pid": r.pid,
                    "incarnation": r.incarnation, "state": r.state, "evidence": r.evidence, "log": r.log,
                    "facts": r.facts_now(self.loop.time()),
                }
                for r in self.ranks
            ],
        }  # fmt: skip

    def on_node_facts(self, node: Node, rank: int, incarnation: int, facts: dict[str, Any]) -> None:
        """A beat brought news of a rank."""
        there = self.ranks[rank]
        if there.incarnation == incarnation and there.slot.node == node.name:
            there.facts, there.facts_at = facts, self.loop.time()


def _by_node(ranks: Sequence[Rank]) -> dict[str, list[Rank]]:
    by_node: dict[str, list[Rank]] = {}
    for rank in ranks:
        by_node.setdefault(rank.slot.node, []).append(rank)
    return by_node


def _full_story(error: Exception) -> str:
    """With the table, if it is about room; with the stack, if it is the owner's."""
    if isinstance(error, InfeasiblePlacement):
        return f"{error.what}\n{error.evidence}"
    if isinstance(error, MilesError):
        return error.what
    stack = "".join(traceback.format_exception(error)).rstrip()
    return f"{error!r}\n{stack}"
