"""Stores of several nodes in one process: what they ask each other is called directly, and can be held up."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from miles_agents.agent.background import Background
from miles_agents.rpc.context import CallContext, call_variable, outside_of_calls
from miles_agents.rpc.errors import DeadlineExceeded, NodeLost
from miles_agents.store import messages
from miles_agents.store.door import Visitor
from miles_agents.store.node_store import NodeStore, StoreParts
from miles_agents.store.others import OtherNodes
from miles_agents.store.peers import Place
from miles_agents.store.ref import Ref
from miles_agents.store.table import Owner
from miles_agents.wire.envelope import AGENT_MESH, Address

MIB = 1 << 20
INCARNATION = 7


def silent(what: str = "the answer did not come in time") -> DeadlineExceeded:
    """What an agent that does not answer in time looks like."""
    return DeadlineExceeded(what, evidence="a test", advice="", may_have_run=True)


class Node:
    """A store, its way to others, and a worker that puts."""

    def __init__(self, network: StoreNetwork, number: int, path: Path, limit: int) -> None:
        self.name, self.place = f"node-{number}", (f"node-{number}", number, INCARNATION)
        parts = StoreParts(limit, 100, path / self.name, "127.0.0.1")
        workers = {"good": "worker[0]"}
        self.store = NodeStore(parts, self.name, Address(AGENT_MESH, number, INCARNATION), workers.get)
        self.store.tasks = self.tasks = Background()
        self.store.others = self.others = OtherNodes(self.store, NetworkPeers(network, self.place))
        self.visitor = Visitor(socket.socket())
        self.visitor.owner = Owner("good:1", "worker[0]")

    async def put(self, data: bytes, copies: int = 1, timeout_s: float = 20.0) -> Ref:
        """As a worker puts."""
        (segment, _), fd = await self.store.answer(self.visitor, [messages.ALLOC, len(data), timeout_s])
        assert fd is not None
        os.pwrite(fd, data, 0)
        os.close(fd)
        question = [messages.COMMIT, segment, [[0, len(data)]], copies, timeout_s]
        ((plain,),), _ = await self.store.answer(self.visitor, question)
        return Ref.from_plain(plain)

    def has(self, ref: Ref) -> bool:
        """Whether it can be read here."""
        return self.store.table.find(ref.key) is not None

    @property
    def num_objects(self) -> int:
        """That can be read here."""
        return self.store.facts()["objects"]

    async def close(self) -> None:
        """As an agent does at the end of a life."""
        await self.tasks.close()
        self.others.close()
        self.store.close()
        self.visitor.channel.close()


class StoreNetwork:
    """Nodes that do not answer (``frozen``), or have ended (``gone``); ``failing``: errors for the next questions."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.asked: list[tuple[str, str, float]] = []
        self.failing: dict[tuple[str, str], list[Exception]] = {}
        self.reports: list[str] = []
        self._frozen: set[str] = set()
        self._gone: set[str] = set()
        self._changed = asyncio.Condition()

    async def freeze(self, name: str) -> None:
        """It answers nothing from now on."""
        self._frozen.add(name)

    async def thaw(self, name: str) -> None:
        """It answers what it was asked meanwhile."""
        async with self._changed:
            self._frozen.discard(name)
            self._changed.notify_all()

    async def end(self, name: str) -> None:
        """Its agent ends."""
        async with self._changed:
            self._gone.add(name)
            self._changed.notify_all()

    def living(self, but: Place) -> list[Place]:
        """Agents that the controller knows, others than this one."""
        return [node.place for node in self.nodes if node.name not in self._gone and node.place != but]

    def times_asked(self, name: str, order: str) -> int:
        """How often."""
        return sum(asked[:2] == (name, order) for asked in self.asked)

    async def reach(self, name: str) -> Node:
        """The node, once it answers."""
        async with self._changed:
            await self._changed.wait_for(lambda: name not in self._frozen or name in self._gone)
        for node in self.nodes:
            if node.name == name and name not in self._gone:
                return node
        raise NodeLost(f"{name} is gone", evidence="a test", advice="", node=name, may_have_run=False)


class NetworkPeers:
    """See ``Peers``."""

    def __init__(self, network: StoreNetwork, own: Place) -> None:
        self._network = network
        self._own = own

    async def ask(self, place: Place, timeout_s: float, order: str, *args: Any) -> Any:
        """The other's endpoint, in a call of this agent."""
        network = self._network
        network.asked.append((place[0], order, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                node = await network.reach(place[0])
                if failures := network.failing.get((place[0], order)):
                    raise failures.pop(0)
                asked: Any = node.others.endpoints()[order](*args)
                return await asyncio.get_running_loop().create_task(asked, context=self._call(order))
        except TimeoutError as error:
            raise (error if isinstance(error, DeadlineExceeded) else silent()) from None

    async def nodes(self, home: str, timeout_s: float) -> tuple[list[Place], str]:
        """As the controller says."""
        return self._network.living(self._own), f"{home} ended: a test"

    def report(self, kind: str, what: str, evidence: str) -> None:
        """Kept."""
        self._network.reports.append(kind)

    def _call(self, order: str) -> Any:
        node: Any = None
        source = Address(AGENT_MESH, self._own[1], self._own[2])
        context = outside_of_calls()
        context.run(call_variable.set, CallContext(node, source, 0, order, 0, 1, None, 0, lambda: False))
        return context


@asynccontextmanager
async def stores(path: Path, count: int, limit: int = 8 * MIB) -> AsyncIterator[StoreNetwork]:
    """So many nodes, each with a store of its own."""
    network = StoreNetwork()
    try:
        for number in range(count):
            network.nodes.append(Node(network, number, path, limit))
        yield network
    finally:
        for node in network.nodes:
            await node.close()
