"""Some RpcNodes with actors, wired to one another through one Switch on one event loop: calls without a network.

Every message takes its wire form on the way, and one turn of the loop (or ``delay_s``) to arrive. Actors run inline on
the loop, so on a virtual clock too, or each on threads of its own as in a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgpack

from miles_agents.errors import MilesError
from miles_agents.rpc.actor import Actor, endpoints_of
from miles_agents.rpc.context import ActorContext
from miles_agents.rpc.errors import NoSuchActor, StaleHandle, WorkerDied
from miles_agents.rpc.host import ActorHost
from miles_agents.rpc.inline import InlineExecutors
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Shape
from miles_agents.rpc.switch import LocalHop, Switch
from miles_agents.virtual_time import run_virtual
from miles_agents.wire.envelope import CONTROLLER_MESH, FIRST_USER_MESH, Address, Envelope, envelope_from_plain

DEADLINE_S = 30.0


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a virtual clock: time costs nothing, and a hang is an error at once."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtual(test(*args, **kwargs))

    return run


class Threads:
    """A "main" thread and an async thread, as in a worker, but they can be stopped."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = [threading.Thread(target=self._run_main, name=f"main of {name}")]
        self._threads[0].start()

    def submit_main(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def async_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._loop.run_forever, name=f"async of {self._name}")
            self._threads.append(thread)
            thread.start()
        return self._loop

    async def stop(self) -> None:
        self._jobs.put(None)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        await eventually(lambda: not any(thread.is_alive() for thread in self._threads), "the end of the threads")
        if self._loop is not None:
            self._loop.close()

    def _run_main(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job


class WireHop:
    """To the actor of one process, by wire form."""

    answers_for_itself = False

    def __init__(self, wired: Wired, node: RpcNode) -> None:
        self._wired = wired
        self._node = node

    def send(self, envelope: Envelope) -> None:
        self._wired.carry(envelope, self._node.deliver)


class Wired:
    """The nodes by address. ``hub`` is the process with the switch; ``delay_s`` is how long messages take."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.delay_s = 0.0
        self.sent: list[Envelope] = []
        self.switch = Switch(self._resolve)
        self.hub = RpcNode(Address(CONTROLLER_MESH, 0, 1), "hub", self.switch.route, libraries="opaque")
        self.switch.attach(self.hub)
        self.nodes: dict[Address, RpcNode] = {self.hub.address: self.hub}
        self.hosts: dict[Address, ActorHost] = {}
        self.threads: list[Threads] = []
        self._hops: dict[Address, Any] = {self.hub.address: LocalHop(self.hub)}
        self._meshes = FIRST_USER_MESH
        self._incarnations = 100

    def carry(self, envelope: Envelope, deliver: Callable[[Envelope], None]) -> None:
        """Pass a message on in its wire form, to arrive later."""
        self.sent.append(envelope)
        plain = msgpack.unpackb(msgpack.packb(envelope.to_plain(self.loop.time())), strict_map_key=False)
        buffers = list(envelope.buffers)

        def arrive() -> None:
            deliver(envelope_from_plain(plain, buffers, self.loop.time())[0])

        if self.delay_s:
            self.loop.call_later(self.delay_s, arrive)
        else:
            self.loop.call_soon(arrive)

    def spawn(
        self, cls: type[Actor], *args: Any, name: str = "actors", threads: bool = False, **dims: int
    ) -> ActorMesh:
        """Actors of one class, each in a "process" of its own; the hub's handle of them."""
        shape = Shape.of(**(dims or {"ranks": 1}))
        info = MeshInfo(self._meshes, name, {}, endpoints_of(cls))
        self._meshes += 1
        for rank in shape.ranks:
            self._incarnations += 1
            info.incarnations[rank] = self._incarnations
            address = Address(info.mesh, rank, self._incarnations)
            label = f"{name}[{rank}]"
            up = functools.partial(self.carry, deliver=self.switch.route)
            node = RpcNode(address, label, up, libraries="import")
            executors: Any = InlineExecutors(self.loop)
            if threads:
                executors = Threads(label)
                self.threads.append(executors)
            host = ActorHost(node, executors)
            host.context = ActorContext(node, "run", name, rank, shape, address.incarnation, "node-0")
            host.serve(cls(*args), endpoints_of(cls))
            self.nodes[address], self.hosts[address] = node, host
            self._hops[address] = WireHop(self, node)
        return ActorMesh(info, shape, self.hub)

    def address(self, mesh: ActorMesh, rank: int = 0) -> Address:
        """Of the process that hosts a rank."""
        return Address(mesh._info.mesh, rank, mesh._info.incarnations[rank])

    def host(self, mesh: ActorMesh, rank: int = 0) -> ActorHost:
        """The host of a rank."""
        return self.hosts[self.address(mesh, rank)]

    def actor(self, mesh: ActorMesh, rank: int = 0) -> Any:
        """The actor itself."""
        return self.host(mesh, rank).actor

    def kill(self, mesh: ActorMesh, rank: int = 0) -> None:
        """The process of a rank dies: nothing reaches it any more, and the switch learns of it."""
        address = self.address(mesh, rank)
        del self._hops[address]
        error = WorkerDied(f"{mesh.name}[{rank}] died", evidence="killed", advice="Look.", may_have_run=True)
        self.switch.receivers_died({address}, error)

    def _resolve(self, mesh: int, target: Any) -> Any:
        address = Address(mesh, target.rank, target.incarnation)
        hop = self._hops.get(address)
        if hop is not None:
            return hop
        if any(known[:2] == address[:2] for known in self._hops):
            return StaleHandle("an earlier life", evidence=str(address), advice="Look it up.", may_have_run=False)
        return NoSuchActor("nobody", evidence=str(address), advice="Look it up.", may_have_run=False)


@contextlib.asynccontextmanager
async def wired() -> AsyncIterator[Wired]:
    """A hub without actors yet; whatever is spawned is stopped on leaving."""
    made = Wired()
    try:
        yield made
    finally:
        error = MilesError("the test is over", advice="Nothing.")
        for node in made.nodes.values():
            node.close(error)
        for threads in made.threads:
            await threads.stop()


async def eventually(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Wait until ``condition`` holds, looking again whenever the loop had a turn."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - what other threads do sets no asyncio event
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true") from None
