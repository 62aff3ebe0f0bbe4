"""Thousands of ranks in one process: what the controller costs, and how calls fare, as the cluster grows.

    python benchmarks/scale.py                        # 10, 100 and 1,000 nodes of 8 ranks; minutes on two cores
    python benchmarks/scale.py --nodes 10 50 --quick  # seconds
    python benchmarks/scale.py --nodes --real         # only real processes: echo while four workers flood their logs

One run per size, on virtual time: a real controller, real agents and real worker runtimes, in memory in place of
sockets and processes. Nodes join; a mesh with a rank for each device is spawned (1 % of the nodes, at least one, stay
free as spares); the cluster idles; all ranks are called; every rank prints without end while single calls are timed;
1 % of the nodes lose power with calls pending, their ranks come back on the spares, and they join again.

What is measured, and how:

* **CPU of the controller**: the thread's CPU clock around everything that runs in the controller's context (messages
  that come to it, its tasks and timers; ``miles_agents.virtual_cost``). Not in it: agents, workers, the memory network
  (a real socket costs some 10 us a message, encryption included), garbage collection (which here walks everybody's
  objects and is off while times are taken).
* **Latency** is virtual: 0.2 ms for each hop between processes, and the controller's CPU time takes time on the
  virtual clock, so that waiting for a busy controller counts; agents and workers are as fast as if each had a machine
  of its own.
* **Memory of the controller**: the sizes of all objects that it reaches, without the network.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from miles_agents import Actor, endpoint
from miles_agents.virtual_cost import run_costed
from miles_controller import Controller, ControllerConfig
from miles_controller.owned_mesh import OwnedMesh
from miles_launcher.local import LocalAgents
from scale_story import QUICK, Effort, Figures, measure

NUM_FLOODERS = 4
ROUNDS = 4


def show(console: Console, sizes: list[Figures]) -> None:
    """A column for each size."""
    table = Table(title=f"One controller, nodes of 8 ranks, virtual time ({os.cpu_count()} cores here)")
    table.add_column("")
    for size in sizes:
        table.add_column(f"{size.num_nodes:,} nodes", justify="right")
    for name in sizes[0].rows:
        table.add_row(name, *(size.rows.get(name, "") for size in sizes))
    console.print(table)
    for what, cost in (
        ("idle", [size.cpu_us_per_node_s for size in sizes]),
        ("under the flood", [size.flood_us_per_node_s for size in sizes]),
    ):
        console.print(
            f"Controller CPU per node and second, {what}: the largest size has {cost[-1] / cost[0]:.2f}x the smallest's"
        )
    for size in sizes:
        for problem in size.problems:
            console.print(f"[bold red]{size.num_nodes} nodes: {problem}")


class Talker(Actor):
    """Writes far more than anyone can read, to its log or into nothing, and answers."""

    @endpoint
    def talk(self, target: str) -> None:
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=self.write, args=(1 if target == "log" else os.open(os.devnull, os.O_WRONLY),)
        )
        self.thread.start()

    def write(self, fd: int) -> None:
        lines = b"".join(
            b"WARNING step %05d of many: loss 0.123, nothing is wrong, really %s\n" % (n, b"x" * 40) for n in range(150)
        )
        while not self.stop.wait(0.005):
            os.write(fd, lines)

    @endpoint
    def hush(self) -> None:
        self.stop.set()
        self.thread.join()

    @endpoint(thread="io")
    def echo(self, value: int) -> int:
        return value


async def echo_times(mesh: OwnedMesh, seconds: float) -> list[float]:
    times = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        await mesh.echo.call_one(1)
        times.append(time.perf_counter() - began)
    return times


async def real_flood(console: Console, seconds: float) -> None:
    """Echo through controller, agent and a quiet worker, while four others write 3 MB/s of warnings each."""
    with tempfile.TemporaryDirectory() as directory:
        async with (
            Controller(ControllerConfig(status=False)) as controller,
            LocalAgents(controller, ["n0"], run_dir=Path(directory), cpu_slots=NUM_FLOODERS + 1),
        ):
            await controller.wait_for_nodes()
            quiet = await controller.spawn("quiet", Talker)
            talkers = await controller.spawn("talkers", Talker, dims={"ranks": NUM_FLOODERS})
            table = Table(title=f"Real processes: echo beside {NUM_FLOODERS} workers that print without end")
            for name in ("", "p50", "p99", "p50, times quiet"):
                table.add_column(name, justify="right" if name else "left")
            found: dict[str, list[float]] = {"quiet": [], "they write into nothing": [], "they write to their logs": []}
            await echo_times(quiet, 1.0)
            for what in ROUNDS * tuple(found):  # in turn, as the machine may have other things to do
                if what != "quiet":
                    await talkers.talk.call("log" if what.endswith("logs") else "null")
                found[what] += await echo_times(quiet, seconds / ROUNDS)
                if what != "quiet":
                    await talkers.hush.call()
            base = statistics.median(found["quiet"])
            for what, times in found.items():
                p50, p99 = statistics.median(times), sorted(times)[int(0.99 * len(times))]
                table.add_row(what, f"{p50 * 1e6:.0f} us", f"{p99 * 1e6:.0f} us", f"{p50 / base:.2f}")
            console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[10, 100, 1000], help="sizes to run")
    parser.add_argument("--quick", action="store_true", help="look for shorter times")
    parser.add_argument("--real", action="store_true", help="also the flood of real processes")
    options = parser.parse_args()
    console = Console(width=max(100, 40 + 32 * len(options.nodes)))
    logging.getLogger("miles_controller").addHandler(logging.NullHandler())  # nodes that are lost on purpose
    gc.disable()  # it would walk the objects of all machines; see the steps of the story
    sizes = []
    for num_nodes in options.nodes:
        began = time.process_time()
        sizes.append(run_costed(measure(num_nodes, QUICK if options.quick else Effort())))
        gc.collect()
        console.print(f"{num_nodes} nodes simulated in {time.process_time() - began:.0f} s of CPU time")
    if sizes:
        show(console, sizes)
    if options.real:
        gc.enable()
        asyncio.run(real_flood(console, 2.0 if options.quick else 12.0))
    return 1 if any(size.problems for size in sizes) else 0


if __name__ == "__main__":
    sys.exit(main())
