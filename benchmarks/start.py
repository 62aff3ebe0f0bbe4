"""How long until the workers of a mesh that have torch answer: by exec, from a cold zygote, from a warm one.

    python benchmarks/start.py [--ranks 8] [--rounds 3] [--modules torch]

Each round starts its own controller and agent. ``start`` is the time from entering the controller to a node that has
joined; ``spawn`` from there to constructed actors that have the modules; both on the wall. ``cpu``: of a worker, from
its birth to its first answer. ``PSS``: of all workers together, shared pages counted once.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from miles_agents import Actor, endpoint
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents


class HasModules(Actor):
    """An actor that needs some modules."""

    def __init__(self, modules: list[str]) -> None:
        for name in modules:
            importlib.import_module(name)

    @endpoint
    def cost(self) -> tuple[float, int]:
        """CPU seconds of this process so far, and its PSS in bytes."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        rollup = Path("/proc/self/smaps_rollup").read_text()
        pss = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return usage.ru_utime + usage.ru_stime, pss << 10


@dataclass(frozen=True, slots=True)
class Took:
    """One round: seconds, seconds, CPU seconds of the median worker, MiB of all workers."""

    start_s: float
    spawn_s: float
    cpu_s: float
    pss_mib: float


async def one_round(way: str, ranks: int, modules: list[str]) -> Took:
    """Start everything, spawn once, measure, end everything."""
    warm = modules if way == "warm zygote" else None
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        began = time.perf_counter()
        config = ControllerConfig(nodes=("n0",), run_dir=Path(folder), status=False)
        async with Controller(config) as controller:
            agents = LocalAgents(controller, ["n0"], run_dir=Path(folder), cpu_slots=ranks, preload=warm)
            async with agents:
                await controller.wait_for_nodes()
                joined = time.perf_counter()
                if warm is not None:
                    await zygote_is_ready(controller)
                asked = time.perf_counter()
                preload = None if way == "exec" else modules
                method = "exec" if way == "exec" else "zygote"
                mesh = await controller.spawn(
                    "bench", HasModules, modules, dims={"ranks": ranks}, preload=preload, start_method=method
                )
                spawned = time.perf_counter()
                costs = list((await mesh.cost.call()).values)
    cpu_s = statistics.median(cpu for cpu, _ in costs)
    return Took(joined - began, spawned - asked, cpu_s, sum(pss for _, pss in costs) / 2**20)


async def zygote_is_ready(controller: Controller) -> None:
    """By what the agent's beats say."""
    agent = controller.fabric.agent(controller.fabric.find("n0")).endpoint("status")
    while not any(zygote["state"] == "ready" for zygote in (await agent.call_one())["zygotes"]):  # noqa: ASYNC110 - asked, not told
        await asyncio.sleep(0.05)


async def main() -> None:
    """All ways in turn, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modules", default="torch", help="with commas between them; empty: none")
    options = parser.parse_args()
    modules = [name for name in options.modules.split(",") if name]
    ways = ("exec", "cold zygote", "warm zygote")
    took: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            took[way].append(await one_round(way, options.ranks, modules))
    print(f"{options.ranks} workers with {'+'.join(modules) or 'no modules'}, medians of {options.rounds} rounds\n")
    print(f"{'way':12} {'start s':>8} {'spawn s':>8} {'cpu ms':>8} {'PSS MiB':>8}  per worker: ms")
    for way in ways:
        start_s, spawn_s, cpu_s, pss = (
            statistics.median(values)
            for values in zip(*((t.start_s, t.spawn_s, t.cpu_s, t.pss_mib) for t in took[way]), strict=True)
        )
        each = spawn_s / options.ranks * 1000
        print(f"{way:12} {start_s:8.2f} {spawn_s:8.3f} {cpu_s * 1000:8.1f} {pss:8.0f}  {each:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
