"""Services: children on nodes that are not ours inside, such as HTTP servers. Their lives are kept by the agents.

Consumes: the owner's orders, changes that agents report. Produces: handles with current ports and phase, events.
Invariant: a handle's phase is the last one reported, and ``lost`` once its node is dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles_agents.errors import ConfigError, MilesError
from miles_agents.names import checked_name
from miles_agents.node_info import NodeInfo
from miles_controller.fabric import Node

if TYPE_CHECKING:
    from miles_controller.controller import Controller

_ORDER_S = 60.0
LOOPBACK = "127.0.0.1"


class NoSuchNode(ConfigError):
    """A node was named that is not in the run now."""

    code = "E-NODE-003"


class NameTaken(ConfigError):
    """Two meshes or services of one run cannot share a name."""

    code = "E-MESH-002"


class ServiceHandle:
    """One service. ``url`` is where its first port listens, as seen from the cluster."""

    def __init__(self, keeper: ServiceKeeper, name: str, node: Node) -> None:
        self.name = name
        self.node = node.name
        self.phase = "starting"
        self.pid: int | None = None
        self.ports: dict[str, int] = {}
        self.log = ""
        self.fault = ""
        self.host = LOOPBACK
        self._keeper = keeper
        self._node = node
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def url(self) -> str:
        """``http://host:port`` of the first port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{next(iter(self.ports.values()), 0)}"

    async def stop(self, why: str = "its owner stopped it") -> None:
        """End it for good; returns when nothing of it runs any more."""
        if self._node.over is None:  # else it has ended together with its node
            await self._keeper.order(self._node, "stop_service", self.name, why)

    async def pause(self) -> None:
        """Do not probe its health until ``resume``."""
        await self._keeper.order(self._node, "steer_service", self.name, "pause", "")

    async def resume(self) -> None:
        """Probe its health again."""
        await self._keeper.order(self._node, "steer_service", self.name, "resume", "")

    async def fence(self, why: str) -> None:
        """Kill it without grace; it stays dead until it is stopped and started anew."""
        await self._keeper.order(self._node, "steer_service", self.name, "fence", why)

    async def wait_for_phase(self, *phases: str, timeout_s: float) -> str:
        """Until it is in one of these phases; returns which. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.phase not in phases:
                await self.next_change()
        return self.phase

    def next_change(self) -> asyncio.Future[None]:
        """Done when something about it is reported from now on."""
        change = asyncio.get_running_loop().create_future()
        self._waiting.append(change)
        return change

    def note(self, phase: str, change: dict[str, Any]) -> None:
        """For the keeper."""
        self.phase = phase
        self.pid = change.get("pid")
        self.ports = dict(change.get("ports") or self.ports)
        self.fault = str(change.get("fault") or "")
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


class ServiceKeeper:
    """All services of a controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._services: dict[tuple[str, str], ServiceHandle] = {}

    async def start(
        self, name: str, argv: Sequence[str], *, node: str | None, ready_timeout_s: float | None, **options: Any
    ) -> ServiceHandle:
        """Start one. ``options`` are the further fields of the agent's ``ServiceSpec``: ``env``, ``ports``, ``host``,
        ``cwd``, ``health_path``, ``health_port``, ``expected_status``, ``numbers``.

        Raises:
            BadName, NoSuchNode, NameTaken; CannotStart, ServiceDied, ServiceNotReady: with the last lines of its
                log, and nothing is left.
        """
        checked_name("service", name)
        place = self._node(node)
        if (place.name, name) in self._services:
            raise NameTaken(
                f"there is a service {name!r} on {place.name} already",
                evidence=f"its phase is {self._services[place.name, name].phase}",
                advice="Stop it first, or choose another name or node.",
            )
        handle = ServiceHandle(self, name, place)
        handle.host = str(options.get("host", handle.host))
        self._services[place.name, name] = handle
        env = {**self._controller.forwarded_env, **options.pop("env", {})}
        plain = {"name": name, "argv": list(argv), "env": env, **options}
        timeout_s = None if ready_timeout_s is None else ready_timeout_s + _ORDER_S
        agent = self._controller.fabric.agent(place).options(timeout_s=timeout_s or _ORDER_S)
        try:
            started = await agent.endpoint("start_service").call_one(plain, ready_timeout_s)
        except BaseException:
            self._services.pop((place.name, name), None)
            raise
        handle.ports, handle.log = dict(started["ports"]), started["log"]
        handle.phase = started["phase"]
        return handle

    async def lease_port(self, node: str | None, owner: str) -> int:
        """A port of a node that nobody else there is given, until ``release_port``. Raises NoSuchNode, NodeLost."""
        return int((await self.order(self._node(node), "lease_ports", owner, 1))[0])

    async def release_port(self, node: str | None, owner: str) -> None:
        """Give it back."""
        await self.order(self._node(node), "release_ports", owner)

    async def order(self, node: Node, order: str, *args: Any) -> Any:
        """Tell the agent of a service. Raises NodeLost if that is gone."""
        if node.over is not None:
            raise node.over
        agent = self._controller.fabric.agent(node).options(timeout_s=_ORDER_S)
        return await agent.endpoint(order).call_one(*args)

    def on_change(self, node: Node, name: str, change: dict[str, Any]) -> None:
        """An agent reported a change."""
        handle = self._services.get((node.name, name))
        if handle is not None:
            handle.note(str(change["to"]), change)
        kind = "service_failed" if change.get("fault") else "service_changed"
        text = f"{change['from']} -> {change['to']}: {change['cause']}"
        self._controller.events.emit(kind, f"{name}@{node.name}", text, **{k: change[k] for k in ("pid", "fault")})
        if change["to"] == "dead":
            self._services.pop((node.name, name), None)

    def on_node_ended(self, node: Node, error: MilesError) -> None:
        """All services there are gone."""
        for key in [key for key in self._services if key[0] == node.name]:
            self._services.pop(key).note("lost", {"fault": str(error)})

    def snapshot(self) -> list[dict[str, Any]]:
        """For the status page."""
        return [
            {"name": s.name, "node": s.node, "phase": s.phase, "pid": s.pid, "ports": s.ports, "fault": s.fault}
            for s in self._services.values()
        ]

    def node_info(self, name: str | None) -> NodeInfo:
        """See ``Controller.node_info``."""
        return self._node(name).info

    def address_of(self, name: str | None) -> str:
        """See ``Controller.address_of``."""
        addresses = self.node_info(name).addresses
        return LOOPBACK if self._controller.config.is_local or not addresses else addresses[0]

    def _node(self, name: str | None) -> Node:
        nodes = self._controller.fabric.nodes
        found = self._controller.fabric.find(name) if name is not None else next(iter(nodes), None)
        if found is None:
            raise NoSuchNode(
                f"no node {name!r} is in the run" if name else "no node is in the run",
                evidence=f"nodes: {', '.join(node.name for node in nodes) or 'none'}",
                advice="Wait for it with wait_for_nodes, or name another.",
            )
        return found
