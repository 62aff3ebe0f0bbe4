"""A whole cluster in this process: a real controller and real agents, on memory transports and a virtual clock."""

import asyncio
from collections.abc import Awaitable, Callable

from miles_agents.simulation import SimulatedNode, SimulatedWorker, simulated_info
from miles_agents.timings import Timings
from miles_agents.virtual_time import run_virtual
from miles_agents.wire.keys import AgentKey
from miles_agents.wire.memory_transport import Faults, MemoryNetwork
from miles_controller import Controller, ControllerConfig

CONTROLLER = "controller"


class SimulatedCluster:
    """``async with SimulatedCluster(3) as cluster``: all nodes have joined.

    ``cluster.told`` holds every event of the controller with the virtual time at which it happened.
    """

    def __init__(
        self, num_nodes=2, *, cpu_slots=8, seed=0, timings=None, join=True, latency_s=0.0002, join_timeout_s=60.0,
        **config,
    ):  # fmt: skip
        self.timings = timings or Timings()
        self.names = [f"node-{index}" for index in range(num_nodes)]
        self.network = MemoryNetwork(seed=seed, latency_s=latency_s)
        self.controller = Controller(
            ControllerConfig(nodes=tuple(self.names), status=False, forward_env=False, timings=self.timings, **config),
            listen=self._listen,
        )
        self.nodes: dict[str, SimulatedNode] = {}
        self.told = []
        self._cpu_slots = cpu_slots
        self._join = join
        self._join_timeout_s = join_timeout_s

    def _listen(self, link):
        allowed = self.controller.allowed
        return self.network.acceptor(CONTROLLER, link, host=CONTROLLER, allow=allowed.__contains__)

    async def __aenter__(self):
        await self.controller.__aenter__()
        self._listener = asyncio.create_task(self._note_events(), name="events")
        for name in self.names:
            self.nodes[name] = self.make_node(name)
        if self._join:
            for node in self.nodes.values():
                node.start()
            await self.controller.wait_for_nodes()
        return self

    async def __aexit__(self, *error):
        try:
            await self.controller.__aexit__(*error)
        finally:
            for node in self.nodes.values():
                if node.is_running:
                    await node.wait_ended(timeout_s=1.0)  # those that were dismissed are about to
                await node.crash()
            self.network.close()
            self._listener.cancel()
            await asyncio.wait([self._listener])

    def make_node(self, name, *, key_of=None, **options):
        """A node that has not been started. ``key_of``: whose key it uses, if not its own."""
        key = AgentKey.from_line(self.controller.issue_key(key_of or name))
        info = simulated_info(name, cpu_slots=self._cpu_slots)
        options.setdefault("join_timeout_s", self._join_timeout_s)
        return SimulatedNode(
            self.network, info, controller=CONTROLLER, user_id=key.own.public, timings=self.timings, **options
        )

    async def _note_events(self):
        async for event in self.controller.events.subscribe():
            self.told.append((self.now, event))

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- finding ---------------------------------------------------------------------------------------------

    def node_of(self, mesh, rank) -> SimulatedNode:
        """Where a rank runs now."""
        return self.nodes[mesh._supervisor.ranks[rank].slot.node]

    def worker(self, mesh, rank) -> SimulatedWorker:
        """The living worker of a rank."""
        info = mesh._info
        for node in self.nodes.values():
            for worker in node.starter.living:
                if (worker.spec.mesh, worker.spec.rank) == (info.mesh, rank):
                    return worker
        raise LookupError(f"{mesh.name}[{rank}] does not run")

    @property
    def living(self) -> list[SimulatedWorker]:
        """All workers that run, anywhere."""
        return [worker for node in self.nodes.values() for worker in node.starter.living]

    def events(self, kind):
        """(virtual time, event) of every event of that kind so far."""
        return [(at, event) for at, event in self.told if event.kind == kind]

    async def event(self, kind, subject=None, *, timeout_s=120.0):
        """The first event of that kind (about that subject), past or future: (virtual time, event)."""

        def found():
            return [pair for pair in self.events(kind) if subject in (None, pair[1].subject)]

        await self.until(lambda: bool(found()), timeout_s=timeout_s)
        return found()[0]

    async def until(self, condition: Callable[[], bool], *, timeout_s=120.0) -> None:
        """Poll a condition in virtual time."""
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - polls what has no event
                await asyncio.sleep(0.001)

    # -- faults ----------------------------------------------------------------------------------------------

    def partition(self, node, *, towards=None):
        """Cut a node off. ``towards``: only what goes to ``"controller"``, or only what goes to the ``"node"``."""
        if towards == "node":
            self.network.partition(CONTROLLER, node, one_way=True)
        else:
            self.network.partition(node, CONTROLLER, one_way=towards == "controller")

    def heal(self, node):
        self.network.heal(node, CONTROLLER)

    def disturb(self, faults: Faults) -> None:
        """Faults on every link between the controller and a node."""
        for name in self.names:
            self.network.set_faults(name, CONTROLLER, faults)
            self.network.set_faults(CONTROLLER, name, faults)

    def disturb_workers(self, faults: Faults) -> None:
        """Faults on every link between an agent and a worker that runs now."""
        for name, node in self.nodes.items():
            for worker in node.starter.living:
                self.network.set_faults(name, worker.host, faults)
                self.network.set_faults(worker.host, name, faults)


def simulate(story: Callable[[], Awaitable[None]], *, limit_s=3600.0):
    """Run a test's story on virtual time."""
    return run_virtual(story(), limit_s=limit_s)


async def outcome(awaitable):
    """The result, or the exception in its place."""
    try:
        return await awaitable
    except Exception as error:
        return error
