"""What a controller can tell an agent to do: the agent's endpoints, and the services that they keep.

Every order has a deadline of its caller; what was begun for an order that is given up is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_agents.agent import service_life
from miles_agents.agent.background import Background
from miles_agents.agent.examiner import Examiner
from miles_agents.agent.logs import last_lines, last_words
from miles_agents.agent.service import Service, ServiceChange, ServiceNotReady, ServiceSpec
from miles_agents.agent.starter import with_node_path
from miles_agents.agent.worker_pool import nobody_cares, too_late
from miles_agents.errors import ConfigError, MilesError, PeerFault
from miles_agents.names import checked_name
from miles_agents.rpc.context import current_call, outside_of_calls
from miles_agents.rpc.errors import DeadlineExceeded, NoSuchActor, StaleHandle, WorkerDied
from miles_agents.rpc.guard import not_your_order
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.shape import Extent, Shape
from miles_agents.wire.envelope import CONTROLLER_MESH
from miles_agents.worker.spec import WorkerSpec, unpack_specs

if TYPE_CHECKING:
    from miles_agents.agent.agent import Agent
    from miles_agents.agent.worker_pool import WorkerPool

logger = logging.getLogger(__name__)
_STACK_S = 2.0
_PRINTED_STACK_S = 1.0
_SERVICE_END_S = 25.0
"""From the end of the grace: killing (10 s), GPU memory (10 s), margin."""


class UnknownService(ConfigError):
    """No service of that name runs on the node, or one does already."""

    code = "E-SVC-004"


class NotOffered(ConfigError):
    """This agent has no means for the order (an agent of a simulation, say)."""

    code = "E-AGENT-003"


class Orders:
    """The agent's endpoints by name. All are async and run on the agent's loop."""

    def __init__(self, agent: Agent, controller: ActorMesh) -> None:
        self.agent = agent
        self.tasks: Background | None = None
        self._leaving = ""
        self._end_by = math.inf
        self._controller = controller
        self._services: dict[str, tuple[Service, asyncio.Task[None]]] = {}
        self._examiner = Examiner()

    def endpoints(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Name to function. All but ``lease_my_ports`` obey the controller only."""
        orders: dict[str, Callable[..., Awaitable[Any]]] = {
            "start_workers": self.start_workers,
            "end_workers": self.end_workers,
            "worker_stack": self.worker_stack,
            "worker_log": self.worker_log,
            "flush_logs": self.flush_logs,
            "lease_ports": self.lease_ports,
            "release_ports": self.release_ports,
            "start_service": self.start_service,
            "steer_service": self.steer_service,
            "stop_service": self.stop_service,
            "status": self.status,
            "examine": self.examine,
        }
        guarded = {name: _for_controller(name, order) for name, order in orders.items()}
        return {**guarded, "lease_my_ports": self.lease_my_ports}

    # -- workers ---------------------------------------------------------------------------------------------

    async def start_workers(self, plain: dict[str, Any]) -> list[dict[str, Any]]:
        """Start workers from ``spec.pack_specs``; returns pid and log path of each once all can be called.

        Where one fails, starts that are under way are broken off and its error is raised; what was ready before is
        left to the controller, which ends the mesh.
        """
        specs = unpack_specs(plain)
        for spec in specs:
            checked_name("mesh", spec.mesh_name)
        try:
            async with asyncio.TaskGroup() as tasks:
                starts = [tasks.create_task(self._start_worker(spec)) for spec in specs]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [start.result() for start in starts]

    async def _start_worker(self, spec: WorkerSpec) -> dict[str, Any]:
        pool = self._pool()
        try:
            return await pool.start(spec)
        except asyncio.CancelledError:
            with contextlib.suppress(PeerFault):  # it never executed
                await pool.end(pool.find(spec.mesh, spec.rank, spec.incarnation), "its start was given up", 0.0)
            raise

    async def end_workers(self, mesh: int, lives: list[list[int]], why: str, grace_s: float | None) -> list[str]:
        """End workers, confirmed: ``lives`` are [rank, incarnation]. ``grace_s`` None: their own; 0: at once.

        Returns a text for each: empty if nothing of it runs any more, else why not.
        """
        ends = (self._end_worker(mesh, rank, incarnation, why, grace_s) for rank, incarnation in lives)
        return await asyncio.gather(*ends)

    async def _end_worker(self, mesh: int, rank: int, incarnation: int, why: str, grace_s: float | None) -> str:
        pool = self._pool()
        try:
            worker = pool.find(mesh, rank, incarnation)
            await pool.end(worker, why, worker.spec.term_grace_s if grace_s is None else grace_s)
        except (WorkerDied, StaleHandle, NoSuchActor) as error:  # it is over already
            logger.debug("%s", error.what)
        except MilesError as error:
            return f"{error.what} ({error.evidence})" if error.evidence else error.what
        return ""

    async def worker_stack(self, mesh: int, rank: int, incarnation: int) -> str:
        """All stacks of a worker: from its interpreter if that answers, else printed by the signal handler."""
        pool = self._pool()
        worker = pool.find(mesh, rank, incarnation)
        info = MeshInfo(mesh, worker.spec.mesh_name, {rank: incarnation})
        handle = ActorMesh(info, Shape(Extent((), ()), (rank,)), self.agent.node)
        if worker.process is None or worker.process.state() in (None, "T", "t"):
            return f"{worker.spec.label} is stopped and cannot show its stack"
        try:
            return str(await handle.options(timeout_s=_STACK_S).endpoint("__stack__").call_one())
        except DeadlineExceeded:
            pass  # the interpreter is held; the signal handler needs no interpreter
        size = _size(worker.log_path)
        worker.process.print_stacks()
        deadline = self.agent.loop.time() + _PRINTED_STACK_S
        while _size(worker.log_path) == size and self.agent.loop.time() < deadline:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)  # the handler writes line by line
        return _read_from(worker.log_path, size) or f"{worker.spec.label} does not react to the stack signal either"

    async def worker_log(self, mesh: int, rank: int, incarnation: int, num_lines: int) -> list[str]:
        """The last lines of a living worker's log."""
        worker = self._pool().find(mesh, rank, incarnation)
        return last_lines(worker.log_path, num_lines)

    async def flush_logs(self, timeout_s: float) -> bool:
        """Everything that workers wrote before this call is with the controller when it returns True."""
        return await self._pool().logs.flush(self.agent.loop.time() + timeout_s)

    # -- ports -----------------------------------------------------------------------------------------------

    async def lease_ports(self, owner: str, count: int) -> list[int]:
        """Ports nobody else on this machine is given; back when ``owner`` (``trainer[3]``) ends."""
        ports = self.agent.parts.ports
        if ports is None:
            raise _not_offered("lease_ports")
        leased = ports.lease(owner, count)
        ports.hand_over(leased)
        return leased

    async def lease_my_ports(self, count: int) -> list[int]:
        """For workers of this node: ports until the caller ends."""
        source = current_call().source
        worker = self._pool().find(source.mesh, source.rank, source.incarnation)
        return await self.lease_ports(worker.spec.label, count)

    async def release_ports(self, owner: str) -> None:
        """Give back what ``owner`` has."""
        if self.agent.parts.ports is not None:
            self.agent.parts.ports.release(owner)

    # -- services --------------------------------------------------------------------------------------------

    async def start_service(self, plain: dict[str, Any], ready_timeout_s: float | None) -> dict[str, Any]:
        """Start a service; with ``ready_timeout_s`` wait until it is healthy. Returns its ports and pid.

        Raises:
            ServiceDied, ServiceNotReady: it did not become healthy, with the last lines of its log.
        """
        parts = self.agent.parts
        if parts.processes is None or parts.ports is None or self.tasks is None:
            raise _not_offered("start_service")
        if self._leaving:
            raise too_late(f"service {plain.get('name')!r}", self._leaving)
        spec = service_spec(plain, parts.log_dir, {**os.environ, **parts.base_env})
        if spec.name in self._services:
            raise UnknownService(
                f"service {spec.name!r} runs on this node already",
                evidence=f"its state is {self._services[spec.name][0].state.phase.value}",
                advice="Stop it first, or choose another name.",
            )
        service = Service(spec, parts.processes, parts.ports, self._on_change)
        task = self.tasks.create_task(service.run(), name=f"service {spec.name}")
        self._services[spec.name] = (service, task)
        logs = self._pool().logs
        logs.add(spec.name, None, spec.log_path, self.agent.loop.time(), start=_size(spec.log_path))
        task.add_done_callback(lambda _: self._forget_service(spec.name))
        if ready_timeout_s is not None:
            deadline = self.agent.loop.time() + ready_timeout_s
            try:
                await service.wait_for(service_life.Phase.READY, deadline=deadline)
            except BaseException as error:
                service.stop("it did not become ready")
                await asyncio.wait([task])  # nothing of it is left when the caller hears of it
                if isinstance(error, TimeoutError):
                    raise _not_ready(service, ready_timeout_s) from None
                raise
        return self._describe(service)

    def _forget_service(self, name: str) -> None:
        self._services.pop(name, None)
        self._pool().logs.finish(name, None, self.agent.loop.time())

    async def steer_service(self, name: str, order: str, why: str) -> None:
        """``order``: pause, release, released, resume or fence."""
        service = self._service(name)
        orders: dict[str, Callable[[], None]] = {
            "pause": service.pause,
            "release": lambda: service.release(done=False),
            "released": lambda: service.release(done=True),
            "resume": service.resume,
            "fence": lambda: service.fence(why),
        }
        if order not in orders:
            raise UnknownService(
                f"service {name!r} cannot be told to {order!r}",
                evidence=f"allowed are {', '.join(orders)}",
                advice="Use one of these.",
            )
        orders[order]()

    async def stop_service(self, name: str, why: str) -> None:
        """End a service for good; returns when nothing of it runs any more."""
        service = self._service(name)
        _, task = self._services[name]
        service.stop(why)
        await asyncio.wait([task])

    def end_all(self, why: str, *, orderly: bool) -> None:
        """End every service and start none any more; ``orderly`` gives them their grace. May be said again."""
        self._leaving = why
        self._examiner.close()
        grace_s = 0.0
        for service, _ in list(self._services.values()):
            if orderly:
                grace_s = max(grace_s, service.spec.numbers.grace_s)
            else:
                service.fence(why)
            service.stop(why)
        self._end_by = min(self._end_by, self.agent.loop.time() + grace_s + _SERVICE_END_S)

    async def wait_all_dead(self) -> list[str]:
        """After ``end_all``: until no service is left but what cannot be killed, which is returned, for people."""
        loop = self.agent.loop
        while (tasks := [task for _, task in self._services.values()]) and loop.time() < self._end_by:
            await asyncio.wait(tasks, timeout=min(1.0, self._end_by - loop.time()))
        return [
            f"service {name}: {service.state.phase.value}, pid {service.state.pid}"
            for name, (service, task) in self._services.items()
            if not task.done()
        ]

    async def status(self) -> dict[str, Any]:
        """Workers, services, zygotes, ports and counters of this node, as plain values."""
        agent = self.agent
        return {
            "workers": self._pool().facts(),
            "services": [self._describe(service) for service, _ in self._services.values()],
            "zygotes": agent.parts.zygotes.facts() if agent.parts.zygotes is not None else [],
            "dropped": {**agent.link.stats.dropped, **self._pool().link.stats.dropped},
            "in_flight": len(agent.switch.in_flight),
            "store": None if agent.store is None else agent.store.status(),
        }

    async def examine(self, question: dict[str, Any]) -> dict[str, Any]:
        """What ``miles_agents.probe`` finds out about this node."""
        return await self._examiner.answer(question)

    def zygote_news(self, kind: str, text: str) -> None:
        """Tell the controller that a zygote was refused, or failed and is replaced."""
        tell = self._controller.endpoint("zygote_news").broadcast
        told = outside_of_calls().run(tell, self.agent.parts.info.node, kind, text)
        told.add_done_callback(nobody_cares)

    def _on_change(self, change: ServiceChange) -> None:
        transition = change.transition
        told = outside_of_calls().run(  # the deadline of the order that started the service is not the report's
            self._controller.endpoint("service_changed").broadcast,
            self.agent.parts.info.node,
            change.name,
            {
                "from": transition.before.value,
                "to": transition.after.value,
                "cause": transition.cause,
                "attempt": change.attempt,
                "pid": change.pid,
                "ports": dict(change.ports),
                "fault": str(change.fault) if change.fault is not None else "",
            },
        )
        told.add_done_callback(nobody_cares)

    def _describe(self, service: Service) -> dict[str, Any]:
        return {
            "name": service.spec.name,
            "phase": service.state.phase.value,
            "ports": dict(service.ports),
            "log": str(service.spec.log_path),
        }

    def _service(self, name: str) -> Service:
        if name not in self._services:
            raise UnknownService(
                f"no service {name!r} runs on this node",
                evidence=f"there are: {', '.join(self._services) or 'none'}",
                advice="Start it, or check the name.",
            )
        return self._services[name][0]

    def _pool(self) -> WorkerPool:
        assert self.agent.workers is not None
        return self.agent.workers


def service_spec(plain: dict[str, Any], log_dir: Path, base_env: dict[str, str]) -> ServiceSpec:
    """A ``ServiceSpec`` from what the controller sent: its fields, ``env`` as additions, ``numbers`` as a dict. A first
    word ``{python}`` is this agent's interpreter."""
    fields = dict(plain)
    argv = fields["argv"]
    fields["argv"] = tuple([sys.executable if word == "{python}" else word for word in argv[:1]] + argv[1:])
    fields["ports"] = tuple(fields.get("ports", ("http",)))
    fields["env"] = {**base_env, **fields.get("env", {})}
    with_node_path(fields["env"], base_env)
    fields["cwd"] = Path(fields["cwd"]) if fields.get("cwd") else None
    fields["numbers"] = service_life.LifeNumbers(**fields.get("numbers", {}))
    fields["log_path"] = log_dir / f"{checked_name('service', fields['name'])}.log"
    return ServiceSpec(**fields)


def _for_controller(name: str, order: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(order)
    async def guarded(*args: Any) -> Any:
        source = current_call().source
        if source.mesh != CONTROLLER_MESH:
            raise not_your_order(name, source)
        return await order(*args)

    return guarded


def _not_ready(service: Service, timeout_s: float) -> ServiceNotReady:
    spec = service.spec
    return ServiceNotReady(
        f"service {spec.name!r} was not healthy within {timeout_s:g} s and was ended",
        evidence=f"GET {spec.health_path} did not answer {spec.expected_status}; its last lines ({spec.log_path}):\n"
        + last_words(last_lines(spec.log_path)),
        advice="Give it more time with ready_timeout_s, or look in its log for what it waits for.",
    )


def _not_offered(order: str) -> NotOffered:
    return NotOffered(
        f"this agent cannot {order}",
        evidence="it was made without processes or ports",
        advice="Use an agent that was started with `miles agent`.",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(256 * 1024).decode(errors="replace")
    except OSError:
        return ""
