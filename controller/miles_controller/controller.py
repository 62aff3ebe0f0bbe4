"""The controller: nodes join it, meshes and services are spawned through it, and nothing is left when it ends.

    async with Controller(ControllerConfig(nodes=("node-0",))) as controller:
        ...start an agent with controller.issue_key("node-0")...
        await controller.wait_for_nodes()
        mesh = await controller.spawn("trainer", Trainer, dims={"gpus": 4})
        losses = await mesh.train.call(batch)

It lives in whatever event loop runs it and keeps no state outside of itself, so that it can be embedded, also more than
once in a process. Consumes: orders of its owner, reports of agents. Produces: handles, events, a status page. Waits
for: nodes (bounded by the caller), agents (bounded by orders' deadlines and leases). Invariants: user code never runs
here; when the context is left, every mesh, service and session has ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from miles_agents.errors import MilesError
from miles_agents.names import checked_name
from miles_agents.node_info import NodeInfo
from miles_agents.rpc.actor import Actor, EndpointInfo
from miles_agents.rpc.context import outside_of_calls
from miles_agents.rpc.errors import ControllerLost, WorkerDied
from miles_agents.rpc.host import ActorHost
from miles_agents.rpc.inline import InlineExecutors
from miles_agents.rpc.lock import Lock
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.overdue import CHECK_S, OverdueWatch
from miles_agents.rpc.shape import Shape
from miles_agents.run_files import usable_directory
from miles_agents.runtime_dir import RuntimeDir, runtime_dir
from miles_agents.wire.envelope import CONTROLLER_MESH, Address
from miles_agents.wire.joined_transport import JoinedAcceptor
from miles_agents.wire.keys import AgentKey, AllowList, KeyPair
from miles_agents.wire.transport import Transport
from miles_agents.wire.unix_auth import proof_key
from miles_agents.wire.unix_transport import UnixAcceptor
from miles_agents.wire.zmq_transport import ZmqAcceptor, ZmqNetwork
from miles_agents.worker.construct import class_location, refuse_inside_loading_script
from miles_agents.worker.spec import check_start
from miles_controller.config import ControllerConfig, forwarded_environment
from miles_controller.events import Event, EventLog
from miles_controller.fabric import Fabric, Node
from miles_controller.lock_service import LockService
from miles_controller.mesh_keeper import MeshKeeper
from miles_controller.meshes import MeshSupervisor, SpawnPlan
from miles_controller.nodes_missing import NodesMissing, nodes_missing, refuse_unknown
from miles_controller.owned_mesh import OwnedMesh
from miles_controller.placement import Inventory, Placement, Request
from miles_controller.policy import Policy
from miles_controller.reports import Reports
from miles_controller.run_orders import RunOrders
from miles_controller.services import ServiceHandle, ServiceKeeper
from miles_controller.status_server import StatusServer
from miles_controller.store_desk import StoreDesk

__all__ = ["Controller", "ControllerConfig", "NodesMissing"]
logger = logging.getLogger(__name__)


class Controller:
    """See the module's docstring. ``listen`` replaces the network, for simulations; ``allowed`` holds the keys."""

    def __init__(
        self, config: ControllerConfig | None = None, *, listen: Callable[[Any], Transport] | None = None
    ) -> None:
        self.config = config or ControllerConfig()
        self.run_id = checked_name("run", self.config.run_id or f"run-{secrets.token_hex(4)}")
        self.forwarded_env: dict[str, str] = {}
        self._listen = listen
        self.allowed = AllowList()
        self._server_keys = KeyPair.generate()
        self._keys: dict[str, AgentKey] = {}
        self._owned = ExitStack()
        self._directory: RuntimeDir | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.meshes = MeshKeeper(self)
        self._incarnation = 0
        self._entered = False
        self.status_server: StatusServer | None = None
        self.on_stop: Callable[[str], None] | None = None
        """Ends what the controller is there for, in good order and soon, given who asked; for ``miles stop``."""
        self.describe_job: Callable[[], Mapping[str, Any]] | None = None
        """What the controller is there for, as plain values for the status page."""

    # -- life ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Controller:
        refuse_inside_loading_script()
        config = self.config
        run_dir = None if config.run_dir is None else usable_directory(config.run_dir)
        if config.forward_env:
            self.forwarded_env = forwarded_environment()
        self.forwarded_env.update(config.env)
        # Later runs give out larger numbers than earlier ones, without anything on disk.
        self._incarnation = time.time_ns() // 1_000_000
        self.events = EventLog(None if run_dir is None else run_dir / "events.jsonl")
        self._owned.callback(self.events.close)
        self.fabric = Fabric(self, self.allowed, config.timings, self.events, self.next_incarnation)
        try:
            self.fabric.overdue_s = config.overdue_s
            self.locks = LockService()
            self.services = ServiceKeeper(self)
            self._serve()
            for node in config.nodes:
                self.fabric.expect(node)
            self.fabric.start(self._listen or self._listen_everywhere())
            if config.status:
                await self._start_status()
        except BaseException:
            await self._close()
            raise
        self._entered = True
        self.background(self._watch_overdue(), "overdue calls")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason = "the run ended" if error is None else f"the run failed: {type(error).__name__}"
        try:
            await self.dismiss(*self.fabric.membership.members, reason=reason)
        finally:
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(list(self._tasks))
            await self._close()

    async def _close(self) -> None:
        """Let go of all that entering opened, as far as it got."""
        try:
            self.fabric.close(_over(self.run_id))
            if self.status_server is not None:
                await self.status_server.close()
        finally:
            self._owned.close()

    async def dismiss(self, *names: str, reason: str) -> list[str]:
        """Goodbye to the agents of these nodes: each ends its workers with their grace, says goodbye itself, and is
        waited for, ``leave_timeout_s`` at most. Ranks there are expected to end; those elsewhere stay supervised, and
        a mesh that has no rank elsewhere is stopped. An agent that comes (back) later is refused, until ``issue_key``
        invites its node again. Returns the nodes that did not say goodbye in time: their leases end them."""
        self.fabric.dismissed.update(dict.fromkeys(names, reason))
        nodes = [node for node in self.fabric.nodes if node.name in names]
        going = {node.name for node in nodes}
        for mesh in self.meshes.living:
            mesh.on_dismissed(going)
        for node in nodes:
            if node.peer is not None:
                node.peer.say_goodbye(reason)
        deadline = self.fabric.loop.time() + self.config.leave_timeout_s
        left: list[str] = []
        for node in nodes:
            try:
                async with asyncio.timeout_at(deadline):
                    await node.ended.wait()
            except TimeoutError:
                text = "it did not say goodbye in time; its lease will end it"
                self.events.emit("node_left_behind", node.name, text)
                left.append(node.name)
        return left

    def _runtime_directory(self) -> RuntimeDir:
        """The run's, for sockets; held until the controller closes."""
        if self._directory is None:
            self._directory = runtime_dir(self.run_id)
            self._owned.enter_context(self._directory)
        return self._directory

    def _listen_everywhere(self) -> Callable[[Any], Transport]:
        """To other machines by tcp, to agents of this one by a unix socket."""
        directory = self._runtime_directory()
        network = ZmqNetwork()
        self._owned.callback(network.close)

        def listen(link: Any) -> Transport:
            keys, timings = self._server_keys, self.config.timings
            remote = ZmqAcceptor(
                self.config.bind, link, curve=keys, allow=self.allowed, network=network, timings=timings
            )
            try:
                path = directory.socket_path(f"controller-{os.getpid()}-{secrets.token_hex(3)}")
                return JoinedAcceptor(remote, UnixAcceptor(f"unix://{path}", link, allow=self.allowed))
            except BaseException:
                remote.close()
                raise

        return listen

    async def _start_status(self) -> None:
        directory = self._runtime_directory().path
        run_dir = None if self.config.run_dir is None else str(self.config.run_dir.resolve())
        self.status_server = StatusServer(
            self.status,
            run_id=self.run_id,
            directory=directory,
            orders=RunOrders(self).by_path(),
            about={"run_dir": run_dir, "began": time.time()},
        )
        await self.status_server.start()

    def _serve(self) -> None:
        reports = Reports(self)
        self._owned.callback(reports.close)
        host = ActorHost(self.fabric.node, InlineExecutors(self.fabric.loop))
        endpoints: dict[str, Callable[..., Any]] = {
            **reports.endpoints(),
            **StoreDesk(self).endpoints(),
            "lock_acquire": self.locks.acquire,
            "lock_give_up": self.locks.give_up,
            "lock_release": self.locks.release,
            "lookup": self.meshes.lookup,
        }
        for name, function in endpoints.items():
            host.bind(EndpointInfo(name, "io", True, False), function)

    # -- nodes -----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where agents dial, with the port that was really bound."""
        return self.fabric.link.transport.address

    @property
    def local_address(self) -> str:
        """Where agents of this machine dial: faster than ``address``, which serves them, too."""
        transport = self.fabric.link.transport
        return transport.local_address if isinstance(transport, JoinedAcceptor) else transport.address

    def address_of(self, node: str | None = None) -> str:
        """Where the other nodes reach what listens on this one (None: the first). Loopback if the controller listens
        there itself: then all nodes are this machine.

        Raises:
            NoSuchNode: it is not in the run now.
        """
        return self.services.address_of(node)

    def node_info(self, node: str | None = None) -> NodeInfo:
        """What this node (None: the first) said of itself. Raises NoSuchNode."""
        return self.services.node_info(node)

    def issue_key(self, node: str) -> str:
        """The key bundle with which an agent can join as ``node``: one JSON line, secret. The same on every call."""
        self.fabric.expect(node)
        self.fabric.dismissed.pop(node, None)
        if node not in self._keys:
            pair = KeyPair.generate()
            self.allowed.add(pair.public, node, proof_key(pair))
            self._keys[node] = AgentKey(self.run_id, node, self._server_keys.public, pair)
        return self._keys[node].to_line()

    def report_node_exit(self, node: str, evidence: str, *, reaper: int | None = None) -> None:
        """Somebody saw the node's reaper end: nothing that its agent started is left. The node is dead at once.

        ``reaper`` is the pid of the one that ended: news of it cannot harm its successor. None: whoever is there now.
        """
        self.fabric.evidence(node, evidence, reaper=reaper)

    async def wait_for_nodes(self, *names: str, timeout_s: float = 60.0) -> None:
        """Until these nodes (default: all whose names are known) have joined.

        Raises:
            NoSuchNode: the run expects no node of that name.
            NodesMissing: some have not, within ``timeout_s``; says which, and who was turned away.
        """
        refuse_unknown(self.fabric, names)
        wanted = list(names) or list(self.fabric.membership.members)
        try:
            async with asyncio.timeout(timeout_s):
                for name in wanted:
                    await self.fabric.wait_for(name)
        except TimeoutError:
            raise nodes_missing(self.fabric, wanted, timeout_s) from None

    def inventory(self) -> Inventory:
        """What there is, and what is used by whom, now."""
        return self.meshes.inventory()

    # -- meshes ----------------------------------------------------------------------------------------------

    def place(self, requests: Sequence[Request], *, num_spares: int = 0) -> Placement:
        """Place gangs together on what is free now; see ``placement.place``. Nothing is taken yet: its devices and
        spare nodes are when a mesh is spawned by it. Raises BadPlacementRequest, InfeasiblePlacement."""
        return self.meshes.place(requests, num_spares=num_spares)

    async def spawn(
        self,
        name: str,
        actor: type[Actor] | str,
        *args: Any,
        dims: Mapping[str, int] | None = None,
        placement: Placement | None = None,
        devices_per_rank: int = 1,
        policy: Policy | None = None,
        env: Mapping[str, str] | None = None,
        rank_env: Callable[[int], Mapping[str, str]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        start_timeout_s: float = 120.0,
        term_grace_s: float = 5.0,
        bind_numa: bool = False,
        oversubscribe: bool = False,
        preload: Sequence[str] | None = None,
        start_method: str = "auto",
    ) -> OwnedMesh:
        """Start a mesh of actors and wait until all are constructed.

        Args:
            name: Unique among living meshes.
            actor: The class, or ``"package.module:Class"`` (which is not imported here).
            args: For every constructor, as are ``kwargs``. They must be able to travel.
            dims: Named dimensions, row-major; a first dimension ``hosts`` puts each of its slices on its own node.
                Default: one rank.
            placement: Where ``place`` put the request of this name; default: a placement of its own.
            devices_per_rank: GPUs or CPU slots of each rank, for the default placement.
            policy: What happens when a rank dies; default: the mesh fails.
            env, rank_env: Variables of the processes, for all and by rank. ``CUDA_VISIBLE_DEVICES="own"`` becomes
                the rank's GPUs.
            start_timeout_s: For each of: process up, actor constructed.
            preload: Modules that all ranks have imported before the actor's class is, such as ``("torch",)``: once per
                node, in a zygote that forks the ranks (docs/actors.md). ``()``: a zygote without any. None: a zygote
                where several ranks of a node can share one.
            start_method: ``"exec"`` for no zygote, ``"zygote"`` for an error where there cannot be one.

        Raises:
            BadName, BadStart, BadPlacementRequest, InfeasiblePlacement, CannotStart, CannotFork, WorkerNeverReady,
                RemoteError (a constructor raised); nothing is left.
        """
        checked_name("mesh", name)
        plan = SpawnPlan(
            where=class_location(actor),
            args=args,
            kwargs=dict(kwargs or {}),
            env=dict(env or {}),
            rank_env=rank_env,
            sys_path=tuple(entry for entry in sys.path if entry),
            start_timeout_s=start_timeout_s,
            term_grace_s=term_grace_s,
            bind_numa=bind_numa,
            preload=check_start(preload, start_method),
            start_method=start_method,
        )
        return await self.meshes.spawn(
            name, plan, policy or Policy(), dims=dims, placement=placement, devices_per_rank=devices_per_rank,
            oversubscribe=oversubscribe,
        )  # fmt: skip

    def find_mesh(self, name: str) -> OwnedMesh | None:
        """The living mesh of that name; None also while it is being started."""
        return self.meshes.find(name)

    def supervisor_of(self, mesh: int) -> MeshSupervisor | None:
        """For the reports of agents."""
        return self.meshes.supervisor_of(mesh)

    def mesh_left(self, supervisor: MeshSupervisor) -> None:
        """A mesh has ended; its name is free."""
        self.meshes.left(supervisor)

    def next_incarnation(self) -> int:
        """A number that was never given out before."""
        self._incarnation += 1
        return self._incarnation

    # -- services, locks, events, status -----------------------------------------------------------------------

    async def start_service(
        self,
        name: str,
        argv: Sequence[str],
        *,
        node: str | None = None,
        ready_timeout_s: float | None = 600.0,
        **options: Any,
    ) -> ServiceHandle:
        """Start a child that is not ours inside on a node and wait until it is healthy; see ``services``."""
        return await self.services.start(name, argv, node=node, ready_timeout_s=ready_timeout_s, **options)

    def lock(self, name: str, *, hold_s: float | None = None, timeout_s: float | None = None) -> Lock:
        """A named lock, for the controller's own use; actors use ``miles_agents.Lock``."""
        own = self.fabric.node.address
        info = MeshInfo(CONTROLLER_MESH, "controller", {0: own.incarnation})
        handle = ActorMesh(info, Shape.of(controller=1), self.fabric.node)
        return Lock(name, hold_s=hold_s, timeout_s=timeout_s, controller=handle)

    async def wait_for_event(self, predicate: Callable[[Event], bool], *, timeout_s: float) -> Event:
        """The first event that fits, past or future. Raises TimeoutError."""
        return await self.events.wait_for(predicate, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """A snapshot in plain values: what the status page serves."""
        from miles_controller.snapshot import snapshot

        return snapshot(self, self.meshes.living)

    # -- for the parts of the controller -------------------------------------------------------------------------

    def background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task for as long as the controller lives; its failure is an event."""
        # It may be begun by a report, whose deadline is not its own.
        task = self.fabric.loop.create_task(work, name=name, context=outside_of_calls())
        self._tasks.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.events.emit("background_failed", task.get_name(), str(error))

    def on_node_joined(self, node: Node) -> None:
        """Fabric: nothing to do; placements see it."""

    def on_node_beat(self, node: Node, facts: dict[str, Any]) -> None:
        """Fabric: news of workers."""
        for mesh, rank, incarnation, _pid, _state, rank_facts in facts.get("workers", []):
            supervisor = self.meshes.supervisor_of(mesh)
            if supervisor is not None:
                supervisor.on_node_facts(node, rank, incarnation, rank_facts)

    def on_node_ended(self, node: Node, error: MilesError) -> None:
        """Fabric: all ranks there have died."""
        for (mesh, rank), route in list(node.workers.items()):
            self.locks.holder_died(route.address)
            supervisor = self.meshes.supervisor_of(mesh)
            if supervisor is not None:
                supervisor.on_exit(rank, route.address.incarnation, error.what)
        self.locks.holder_died(node.address)
        self.services.on_node_ended(node, error)

    def on_worker_exited(self, address: Address, error: WorkerDied, *, expected: bool) -> None:
        """Reports: a worker is gone."""
        route = self.fabric.worker_died(address, error)
        if route is None:
            return
        self.locks.holder_died(address)
        if not expected:
            self.events.emit("worker_died", route.label, error.what, evidence=error.evidence)
        supervisor = self.meshes.supervisor_of(address.mesh)
        if supervisor is not None:
            supervisor.on_exit(address.rank, address.incarnation, error.fields.get("exit", error.what))

    async def _watch_overdue(self) -> None:
        watch = OverdueWatch(self.fabric.switch.in_flight, self.config.overdue_s)
        while True:
            await asyncio.sleep(CHECK_S)
            now = self.fabric.loop.time()
            for passed in watch.news(now):
                supervisor = self.meshes.supervisor_of(passed.receiver.mesh)
                if supervisor is not None:
                    await supervisor.report_overdue(passed.receiver.rank, passed.method, now - passed.since)


def _over(run_id: str) -> ControllerLost:
    return ControllerLost(
        f"the controller of {run_id} has ended",
        evidence="its context was left",
        advice="Make calls only inside of `async with Controller(...)`.",
        may_have_run=False,
    )
