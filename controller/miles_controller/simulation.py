"""A controller and its simulated nodes on one virtual clock, with what the controller costs on an account of its own.

For large simulations: ``async with MeasuredCluster(1000) as cluster`` inside of ``run_costed``. All that the controller
does runs inside of ``cluster.cpu``, the rest (agents, workers, the network) outside of it. Consumes: the number of
nodes, orders to lose some. Produces: a real ``Controller`` with nodes that have joined, and counters. Waits for:
virtual time only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from miles_agents.agent.logs import OpenTail
from miles_agents.simulation import SimulatedNode, simulated_info
from miles_agents.timings import Timings
from miles_agents.virtual_cost import CpuAccount
from miles_agents.wire.keys import AgentKey
from miles_agents.wire.memory_transport import MemoryNetwork
from miles_agents.wire.transport import Buffer, Connection, Transport, TransportHandler, TransportStats
from miles_controller.config import ControllerConfig
from miles_controller.controller import Controller

T = TypeVar("T")
_CONTROLLER = "controller"


class _BookedTransport:
    """A transport whose work is not the controller's, with a handler whose work is."""

    def __init__(
        self, cpu: CpuAccount, network: MemoryNetwork, handler: TransportHandler, controller: Controller
    ) -> None:
        self._cpu = cpu
        self._handler = handler
        allow = controller.allowed.__contains__
        self._transport: Transport = cpu.leave(
            lambda: network.acceptor(_CONTROLLER, self, host=_CONTROLLER, allow=allow)
        )

    # What the network says:

    def on_up(self, connection: Connection) -> None:
        """See ``TransportHandler``."""
        self._cpu.enter(self._handler.on_up, connection)

    def on_down(self, connection: Connection) -> None:
        """See ``TransportHandler``."""
        self._cpu.enter(self._handler.on_down, connection)

    def on_message(self, connection: Connection, frames: Sequence[Buffer], user_id: str) -> None:
        """See ``TransportHandler``."""
        self._cpu.enter(self._handler.on_message, connection, frames, user_id)

    # What the controller asks:

    @property
    def address(self) -> str:
        """See ``Transport``."""
        return self._transport.address

    @property
    def stats(self) -> TransportStats:
        """See ``Transport``."""
        return self._transport.stats

    def send(self, connection: Connection, frames: Sequence[Buffer]) -> bool:
        """See ``Transport``."""
        return self._cpu.leave(self._transport.send, connection, frames)

    def close(self) -> None:
        """See ``Transport``."""
        self._cpu.leave(self._transport.close)


class MeasuredCluster:
    """See the module's docstring.

    Args:
        num_nodes: All join before the context is entered.
        takes_time: The controller's CPU time passes on the virtual clock, too.
        open_tail: What workers print, see ``SimulatedNode``; None: nothing.

    Attributes:
        join_s, join_cpu_s: Virtual and CPU seconds in which all nodes were registered.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        cpu_slots: int = 8,
        takes_time: bool = False,
        timings: Timings | None = None,
        open_tail: OpenTail | None = None,
    ) -> None:
        self.cpu = CpuAccount(takes_time=takes_time)
        self.network = MemoryNetwork()
        self.timings = timings or Timings()
        self.names = [f"node-{index}" for index in range(num_nodes)]
        self.nodes: dict[str, SimulatedNode] = {}
        self.controller = Controller(
            ControllerConfig(nodes=tuple(self.names), status=False, forward_env=False, timings=self.timings),
            listen=lambda link: _BookedTransport(self.cpu, self.network, link, self.controller),
        )
        self.join_s = 0.0
        self.join_cpu_s = 0.0
        self._cpu_slots = cpu_slots
        self._open_tail = open_tail

    async def __aenter__(self) -> MeasuredCluster:
        self.cpu.__enter__()
        await self.work(self.controller.__aenter__())
        keys = self.cpu.enter(lambda: {name: self.controller.issue_key(name) for name in self.names})
        for name, line in keys.items():
            self.nodes[name] = SimulatedNode(
                self.network,
                simulated_info(name, cpu_slots=self._cpu_slots),
                controller=_CONTROLLER,
                user_id=AgentKey.from_line(line).own.public,
                timings=self.timings,
                open_tail=self._open_tail,
            )
        began, spent = self.now, self.cpu.seconds
        for node in self.nodes.values():
            node.start()
        await self.work(self.controller.wait_for_nodes())
        self.join_s, self.join_cpu_s = self.now - began, self.cpu.seconds - spent
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.work(self.controller.__aexit__(kind, error, trace))
        finally:
            for node in self.nodes.values():
                if node.is_running:
                    await node.wait_ended(timeout_s=1.0)
                await node.crash()
            self.network.close()
            self.cpu.__exit__()

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()

    @property
    def stats(self) -> TransportStats:
        """Frames and bytes at the controller."""
        return self.controller.fabric.link.transport.stats

    async def work(self, work: Coroutine[Any, Any, T]) -> T:
        """Let the controller, or its owner's program, do something; it is booked."""
        return await self.cpu.task(work, "booked work")

    async def lose(self, names: Iterable[str]) -> None:
        """These nodes lose their power: agents and workers are gone, and nobody saw it."""
        for name in names:
            await self.nodes[name].crash()

    async def rejoin(self, names: Sequence[str], *, timeout_s: float = 60.0) -> None:
        """Start the agents of these nodes again and wait for them."""
        for name in names:
            self.nodes[name].start()
        await self.work(self.controller.wait_for_nodes(*names, timeout_s=timeout_s))
