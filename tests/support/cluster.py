"""Real clusters for tests: a controller here, agents and workers as processes, and means to do harm to them.

``real_cluster`` checks on leaving that none of the processes that it knew of is left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from miles_agents.timings import Timings
from miles_controller import Controller, ControllerConfig
from miles_controller.events import Event
from miles_launcher.local import LocalAgents
from support.procs import ProcessIdentity, alive, eventually, process_identity

DEADLINE_S = 30.0
SHORT = Timings(beat_s=0.2, suspect_s=1.0, fence_s=3.0, dead_s=4.0)
PATIENT = Timings(beat_s=0.2, suspect_s=2.0, fence_s=15.0, dead_s=20.0)
"""For machines with other things to do: nothing ends by a lease unless it is really gone."""


class Door:
    """What local agents see of the controller: optionally at another address, optionally without proof of death."""

    def __init__(self, controller: Controller, *, address: str = "", tells_exits: bool = True) -> None:
        self.controller = controller
        self.local_address = address or controller.local_address
        self.tells_exits = tells_exits
        self.exits: list[tuple[str, str]] = []

    def issue_key(self, node: str) -> str:
        return self.controller.issue_key(node)

    def report_node_exit(self, node: str, evidence: str, *, reaper: int) -> None:
        self.exits.append((node, evidence))
        if self.tells_exits:
            self.controller.report_node_exit(node, evidence, reaper=reaper)

    async def dismiss(self, *nodes: str, reason: str) -> None:
        await self.controller.dismiss(*nodes, reason=reason)


@dataclass
class Cluster:
    """A running controller with its agents, and what was seen of their processes."""

    controller: Controller
    agents: LocalAgents
    door: Door
    run_dir: Path
    seen: dict[int, ProcessIdentity] = field(default_factory=dict)

    def reaper(self, node: str = "node-0") -> int:
        """Pid of the process that LocalAgents started for the node."""
        return self.agents.agents[node].pid

    def agent(self, node: str = "node-0") -> int:
        """Pid of the node's agent."""
        for child in psutil.Process(self.reaper(node)).children():
            if "miles_agents.agent" in child.cmdline():
                return child.pid
        raise AssertionError(f"{node} has no agent")

    def identities(self) -> list[ProcessIdentity]:
        """All processes of this cluster that run now, remembered for the end."""
        for agent in self.agents.agents.values():
            try:
                reaper = psutil.Process(agent.pid)
                pids = [agent.pid, *(child.pid for child in reaper.children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            for pid in pids:
                identity = process_identity(pid)
                if identity is not None:
                    self.seen[pid] = identity
        return [identity for identity in self.seen.values() if alive(identity)]

    def log(self, node: str = "node-0") -> str:
        """What agent and reaper of a node wrote."""
        return self.agents.agents[node].log_path.read_text(errors="replace")

    async def event(self, kind: str, subject: str = "", *, fits: Callable[[Event], bool] = lambda _: True) -> Event:
        """The first event of this kind, past or future."""
        try:
            return await self.controller.wait_for_event(
                lambda e: e.kind == kind and subject in e.subject and fits(e), timeout_s=DEADLINE_S
            )
        except TimeoutError:
            told = "\n".join(f"{e.kind} {e.subject}: {e.text}" for e in self.controller.events.history)
            raise AssertionError(f"no {kind} of {subject!r}; events were:\n{told}") from None

    def events(self, kind: str, subject: str = "") -> list[Event]:
        """So far."""
        return [e for e in self.controller.events.history if e.kind == kind and subject in e.subject]


def node_names(count: int) -> tuple[str, ...]:
    """node-0, node-1, ..."""
    return tuple(f"node-{index}" for index in range(count))


@asynccontextmanager
async def real_cluster(
    run_dir: Path,
    *,
    num_nodes: int = 1,
    cpu_slots: int = 4,
    timings: Timings = PATIENT,
    tells_exits: bool = True,
    address: Callable[[Controller], str] | None = None,
    leave_timeout_s: float = 10.0,
    env: dict[str, str] | None = None,
    status: bool = False,
    store_bytes: int | None = None,
    **config: Any,
) -> AsyncIterator[Cluster]:
    """Controller and agents, joined. ``address``: where the agents dial in place of the controller (a proxy)."""
    names = node_names(num_nodes)
    settings = ControllerConfig(
        nodes=names, run_dir=run_dir, timings=timings, leave_timeout_s=leave_timeout_s, status=status, **config
    )
    cluster: Cluster | None = None
    async with Controller(settings) as controller:
        door = Door(controller, address=address(controller) if address else "", tells_exits=tells_exits)
        agents = LocalAgents(
            door, names, run_dir=run_dir, cpu_slots=cpu_slots, timings=timings, store_bytes=store_bytes, env=env
        )
        async with agents:
            await controller.wait_for_nodes(timeout_s=DEADLINE_S)
            cluster = Cluster(controller, agents, door, run_dir)
            yield cluster
            cluster.identities()
    left = [identity for identity in cluster.seen.values() if alive(identity)]
    assert not left, f"still running: {left}"


def kill(pid: int, number: int = signal.SIGKILL) -> float:
    """Send a signal; returns when (``time.perf_counter``)."""
    at = time.perf_counter()
    os.kill(pid, number)
    return at


async def error_of(awaitable: Any, kind: type[BaseException], timeout_s: float = DEADLINE_S) -> Any:
    """The error with which it ends. Fails if it ends otherwise, or not at all."""
    try:
        async with asyncio.timeout(timeout_s):
            value = await awaitable
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {value!r}")


async def all_gone(identities: Sequence[ProcessIdentity | None], timeout_s: float = DEADLINE_S) -> None:
    """Until none of these processes runs."""
    await eventually(lambda: not any(map(alive, identities)), timeout_s, what=f"end of {identities}")


def known(pid: int) -> ProcessIdentity:
    """The identity of a process that is there."""
    identity = process_identity(pid)
    assert identity is not None, f"pid {pid} is not there"
    return identity


class Proxy:
    """A TCP forwarder between agents and controller whose wires can be cut and stalled. A context manager."""

    def __init__(self) -> None:
        self._target = ("", 0)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_cut = False
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        self.num_connections = 0
        self.address = ""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lead_to(self, controller: Controller) -> str:
        """Forward to this controller; returns where its agents are to dial."""
        host, _, port = controller.address.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        return self.address

    def cut(self) -> None:
        """Reset all connections, and every new one, until ``heal``."""
        self._is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self, *directions: str) -> None:
        """Read, but pass nothing on: ``up`` is from the agents to the controller, ``down`` the way back."""
        for direction in directions:
            self._open[direction].clear()

    def heal(self) -> None:
        """Let everything through again, what was held back first."""
        self._is_cut = False
        for gate in self._open.values():
            gate.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self._is_cut:
                return
            self.num_connections += 1
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._writers.add(far_writer)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._pump(reader, far_writer, self._open["up"]))
                    tasks.create_task(self._pump(far_reader, writer, self._open["down"]))
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        except (OSError, ExceptionGroup):
            return
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        while data := await reader.read(65536):
            await gate.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionError("one end closed, so does the other")
