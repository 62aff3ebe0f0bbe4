"""What happens at one size of ``benchmarks/scale.py``, and what is looked at meanwhile. See there."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import math
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from miles_agents import Actor, endpoint
from miles_agents.rpc.errors import NodeLost
from miles_agents.simulated_logs import Flood
from miles_agents.virtual_cost import CpuAccount
from miles_agents.wire.transport import Transport
from miles_controller import Policy
from miles_controller.owned_mesh import OwnedMesh
from miles_controller.placement import Request
from miles_controller.simulation import MeasuredCluster

RANKS_PER_NODE = 8
LINES_PER_S = 50.0
"""Of every rank: with a thousand nodes 400,000 warnings a second, 40 MB."""
QUIET_S = 2.0
DRAIN_S = 20.0
STAY_S = 30.0
"""Longer than a lease, and than what it takes to bring ranks back."""


class Rank(Actor):
    """One rank of the mesh."""

    @endpoint
    def echo(self, value: Any) -> Any:
        return value

    @endpoint
    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class Effort:
    """How long to look."""

    idle_s: float = 5.0
    flood_s: float = 4.0
    num_calls: int = 200
    call_every_s: float = 0.01


QUICK = Effort(idle_s=3.0, flood_s=2.0, num_calls=50)


@dataclass
class Figures:
    """What one size showed: rows of the table, by name."""

    num_nodes: int
    rows: dict[str, str] = field(default_factory=dict)
    cpu_us_per_node_s: float = 0.0
    flood_us_per_node_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def check(self, fact: bool, what: str) -> None:
        if not fact:
            self.problems.append(what)


class Story:
    """The run of one size."""

    def __init__(self, cluster: MeasuredCluster, num_nodes: int, effort: Effort, pouring: Flood) -> None:
        self.cluster = cluster
        self.pouring = pouring
        self.controller = cluster.controller
        self.effort = effort
        self.figures = Figures(num_nodes)
        self.num_spares = len(cluster.names) - num_nodes
        self.mesh: OwnedMesh
        self.console = io.StringIO()

    def row(self, name: str, value: str) -> None:
        self.figures.rows[name] = value

    async def run(self) -> Figures:
        steps: list[Callable[[], Awaitable[None]]] = [
            self.joined, self.spawn, self.idle, self.call_all, self.flood, self.lose, self.rejoin, self.memory,
        ]  # fmt: skip
        for step in steps:
            await step()
            gc.collect()  # between the steps, as it is off in them
        return self.figures

    async def booked(self, work: Any) -> tuple[Any, float, float]:
        """The result of something that the controller's owner does, its virtual seconds and its CPU seconds."""
        began, spent = self.cluster.now, self.cluster.cpu.seconds
        result = await self.cluster.work(work)
        return result, self.cluster.now - began, self.cluster.cpu.seconds - spent

    async def joined(self) -> None:
        nodes = len(self.cluster.names)
        self.figures.check(len(self.controller.fabric.nodes) == nodes, "not all nodes joined")
        cpu_us = self.cluster.join_cpu_s / nodes * 1e6
        self.row("register all nodes at once", f"{self.cluster.join_s * 1e3:.0f} ms, {cpu_us:.0f} us CPU per node")

    async def spawn(self) -> None:
        num_nodes = self.figures.num_nodes
        num_ranks = num_nodes * RANKS_PER_NODE

        async def start() -> OwnedMesh:
            request = Request("ranks", num_ranks, ranks_per_node=RANKS_PER_NODE)
            placement = self.controller.place([request], num_spares=self.num_spares)
            dims = {"hosts": num_nodes, "gpus": RANKS_PER_NODE}
            return await self.controller.spawn(
                "ranks", Rank, dims=dims, placement=placement, policy=Policy("restart"), start_timeout_s=600.0
            )

        self.mesh, took_s, cpu_s = await self.booked(start())
        self.row("spawn a rank per device", f"{took_s:.2f} s, {cpu_s / num_ranks * 1e6:.0f} us CPU per rank")

    async def idle(self) -> None:
        await asyncio.sleep(QUIET_S)
        self.figures.cpu_us_per_node_s = await self.observed("idle", self.effort.idle_s)
        times = await self.timed_calls(self.effort.idle_s)
        self.row("  idle: one call, p50, p99, worst", show_times(times))

    async def observed(self, name: str, seconds: float) -> float:
        """Rows of what the controller takes while time passes; returns its CPU time in us per node and second."""
        stats, cpu = self.cluster.stats, self.cluster.cpu
        before = (stats.received_messages, stats.sent_messages, stats.received_bytes, stats.sent_bytes, cpu.seconds)
        began = self.cluster.now
        await asyncio.sleep(seconds)
        per = len(self.cluster.names) * (self.cluster.now - began)
        after = (stats.received_messages, stats.sent_messages, stats.received_bytes, stats.sent_bytes, cpu.seconds)
        got, sent, got_bytes, sent_bytes, cpu_s = ((new - old) / per for new, old in zip(after, before, strict=True))
        self.row(f"{name}: CPU per node and s", f"{cpu_s * 1e6:.0f} us")
        self.row(f"  {name}: of a core, all nodes", f"{cpu_s * len(self.cluster.names) * 100:.2g} %")
        self.row(f"  {name}: frames in, out (node, s)", f"{got:.2f}, {sent:.2f}")
        self.row(f"  {name}: bytes in, out (node, s)", f"{got_bytes:.0f}, {sent_bytes:.0f}")
        return cpu_s * 1e6

    async def timed_calls(self, within_s: float) -> list[float]:
        """Latencies of single calls, to one rank after the other."""
        ranks = [
            self.mesh.slice(hosts=number * 7919 % self.figures.num_nodes, gpus=number % RANKS_PER_NODE)
            for number in range(self.effort.num_calls)
        ]

        async def calls() -> list[float]:
            times = []
            for number, rank in enumerate(ranks):
                began = self.cluster.now
                self.figures.check(await rank.echo.call_one(number) == number, "a wrong answer")
                times.append(self.cluster.now - began)
                await asyncio.sleep(within_s / len(ranks))
            return times

        return await self.cluster.work(calls())

    async def call_all(self) -> None:
        num_ranks = len(self.mesh)

        async def broadcast() -> None:
            await self.mesh.echo.broadcast(1)

        answers, took_s, cpu_s = await self.booked(self.echo_of_all())
        self.figures.check(answers == num_ranks, f"{answers} of {num_ranks} ranks answered")
        self.row("call every rank", f"{took_s * 1e3:.1f} ms, {cpu_s / num_ranks * 1e6:.0f} us CPU per rank")
        _, took_s, cpu_s = await self.booked(broadcast())
        self.row("broadcast to every rank", f"{took_s * 1e3:.1f} ms, {cpu_s / num_ranks * 1e6:.0f} us CPU per rank")

    async def flood(self) -> None:
        handler = logging.StreamHandler(self.console)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        remote = logging.getLogger("miles.remote")
        remote.addHandler(handler)
        remote.setLevel(logging.INFO)
        remote.propagate = False
        began = self.cluster.now
        self.pouring.lines_per_s = LINES_PER_S
        try:
            timing = asyncio.create_task(self.timed_calls(self.effort.flood_s))
            self.figures.flood_us_per_node_s = await self.observed("flood", self.effort.flood_s)
            times = await timing
            rate = self.pouring.num_lines / (self.cluster.now - began)
            shown = self.console.getvalue().count("\n") / (self.cluster.now - began)
            self.row("  flood: lines printed, shown per s", f"{rate:,.0f}, {shown:,.0f}")
            self.row("  flood: one call, p50, p99, worst", show_times(times))
            suspects = [event for event in self.controller.events.history if event.kind == "node_suspect"]
            self.figures.check(not suspects, f"{len(suspects)} nodes were suspected under the flood")
        finally:
            self.pouring.lines_per_s = 0.0
        await asyncio.sleep(DRAIN_S)  # what agents had kept is shown, too
        remote.removeHandler(handler)

    async def lose(self) -> None:
        """Power fails on as many nodes as there are spares, with a call pending at every rank."""
        lost = self.cluster.names[: self.num_spares]
        num_ranks = self.num_spares * RANKS_PER_NODE
        began = self.cluster.now

        async def wait() -> list[Any]:
            calls = self.mesh.options(return_exceptions=True).wait.call(STAY_S)
            return list((await calls).values)

        async def answered_s() -> float:
            outcomes = await self.mesh.slice(hosts=0).options(return_exceptions=True).wait.call(STAY_S)
            self.figures.check(all(isinstance(one, NodeLost) for one in outcomes), "a lost rank gave an answer")
            return self.cluster.now - began

        async def back_s() -> float:
            left = num_ranks
            async for _ in self.controller.events.subscribe("worker_restarted"):
                left -= 1
                if not left:
                    break
            return self.cluster.now - began

        waiting = self.cluster.cpu.task(wait(), "after a loss")
        answered = self.cluster.cpu.task(answered_s(), "after a loss")
        back = self.cluster.cpu.task(back_s(), "after a loss")
        await asyncio.sleep(0.1)
        spent = self.cluster.cpu.seconds
        await self.cluster.lose(lost)
        async with asyncio.timeout(2 * STAY_S):
            self.row("power lost on", f"{len(lost)} nodes, {num_ranks} ranks")
            self.row("  pending calls answered after", f"{await answered:.1f} s")
            self.row("  all ranks back after", f"{await back:.1f} s")
            idle_us = self.figures.cpu_us_per_node_s * len(self.cluster.names) * (self.cluster.now - began)
            cpu_us = (self.cluster.cpu.seconds - spent) * 1e6 - idle_us
            self.row("  CPU per lost rank", f"{cpu_us / num_ranks:.0f} us")
            outcomes = await waiting
        dead = sum(isinstance(outcome, NodeLost) for outcome in outcomes)
        self.figures.check(dead == num_ranks, f"{dead} of {num_ranks} calls to lost ranks were answered with the loss")
        self.figures.check(outcomes.count(None) == len(outcomes) - dead, "calls to other ranks were harmed")
        answers, _, _ = await self.booked(self.echo_of_all())
        self.figures.check(answers == len(self.mesh), f"{answers} ranks answered after the loss")

    async def echo_of_all(self) -> int:
        return int(sum((await self.mesh.echo.call(1)).values))

    async def rejoin(self) -> None:
        lost = self.cluster.names[: self.num_spares]
        await self.cluster.rejoin(lost)

        async def use() -> int:
            dims = {"hosts": len(lost), "gpus": RANKS_PER_NODE}
            again = await self.controller.spawn("again", Rank, dims=dims)
            used = {rank.slot.node for rank in again._supervisor.ranks}
            self.figures.check(used == set(lost), "the mesh is not on the nodes that joined again")
            answers = int(sum((await again.echo.call(1)).values))
            await again.stop(grace_s=0.0)
            return answers

        answers, _, _ = await self.booked(use())
        self.figures.check(answers == len(lost) * RANKS_PER_NODE, "a node that joined again cannot be used")
        self.row("  joined again and used", f"{len(lost)} nodes")

    async def memory(self) -> None:
        size = reachable_bytes(self.controller)
        self.row("controller's memory per node", f"{size / len(self.cluster.names) / 1024:.0f} KiB")


def show_times(times: list[float]) -> str:
    ordered = sorted(times)
    p50, p99 = statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]
    return ", ".join(f"{seconds * 1e3:.2f}" for seconds in (p50, p99, ordered[-1])) + " ms"


_NOT_THE_CONTROLLERS = (
    ModuleType, type, FunctionType, BuiltinFunctionType, MethodType, CodeType, asyncio.AbstractEventLoop, CpuAccount,
    logging.Logger,
)  # fmt: skip


def reachable_bytes(root: object) -> int:
    """Bytes of all objects that are reached from here, each once: no code, nothing below a transport."""
    seen = {id(root)}
    waiting: list[Any] = [root]
    total = 0
    while waiting:
        found = waiting.pop()
        total += sys.getsizeof(found)
        for other in gc.get_referents(found):
            if id(other) not in seen and not isinstance(other, _NOT_THE_CONTROLLERS):
                seen.add(id(other))
                if not isinstance(other, Transport):
                    waiting.append(other)
    return total


async def measure(num_nodes: int, effort: Effort) -> Figures:
    """The story of one size."""
    flood = Flood()
    num_spares = max(1, num_nodes // 100)
    async with MeasuredCluster(num_nodes + num_spares, takes_time=True, open_tail=flood.open_tail) as cluster:
        return await Story(cluster, num_nodes, effort, flood).run()
