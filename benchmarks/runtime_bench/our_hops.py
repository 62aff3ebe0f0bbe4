"""Where the time of our calls goes: both ways of a call, and what each process spends on it.

The clock of ``time.perf_counter`` is the machine's, so that stamps of different processes can be compared. A thread
that has to be woken costs tens of microseconds where the machine is virtual; how many are woken per call says more
about latency than CPU time does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from miles_agents import Actor, endpoint
from miles_controller import Controller
from runtime_bench.child import Effort, Reporter
from runtime_bench.figures import percentile
from runtime_bench.rows import HOPS_FLIGHT, HOPS_IO, HOPS_MAIN
from runtime_bench.sampling import NUM_IN_FLIGHT, TEXT

_US = 1e6


class Clock(Actor):
    """Says when it was reached."""

    @endpoint
    def now(self, text: str) -> float:
        return time.perf_counter()

    @endpoint(thread="io")
    def now_io(self, text: str) -> float:
        return time.perf_counter()

    @endpoint(thread="io")
    def pid(self) -> int:
        return os.getpid()


async def measure(controller: Controller, agent: int, reporter: Reporter, effort: Effort) -> None:
    """All of it. ``agent``: its pid."""
    mesh = await controller.spawn("clock", Clock)
    pids = {"controller": os.getpid(), "agent": agent, "worker": await mesh.pid.call_one()}
    for column, now in ((HOPS_MAIN, mesh.now), (HOPS_IO, mesh.now_io)):
        for _ in range(effort.num_warm_up):
            await now.call_one(TEXT)
        with _cost(pids, reporter, column, effort.num_calls):
            there, back = await _legs(lambda now=now: now.call_one(TEXT), effort.num_calls)  # type: ignore[misc]
        reporter.sample("there", percentile(there, 50) * _US, column=column)
        reporter.sample("back", percentile(back, 50) * _US, column=column)
    with _cost(pids, reporter, HOPS_FLIGHT, effort.num_batches * NUM_IN_FLIGHT):
        for _ in range(effort.num_batches):
            for future in [mesh.now.call_one(TEXT) for _ in range(NUM_IN_FLIGHT)]:
                await future


async def _legs(call: Callable[[], Awaitable[Any]], number: int) -> tuple[list[float], list[float]]:
    there, back = [], []
    for _ in range(number):
        begin = time.perf_counter()
        reached = await call()
        end = time.perf_counter()
        there.append(reached - begin)
        back.append(end - reached)
    return there, back


@contextlib.contextmanager
def _cost(pids: dict[str, int], reporter: Reporter, column: str, num_calls: int) -> Iterator[None]:
    """What each process spends, per call."""
    cpu, woken = ({name: ask(pid) for name, pid in pids.items()} for ask in (_cpu_seconds, _wakes))
    yield
    for name, pid in pids.items():
        reporter.sample(f"cpu.{name}", (_cpu_seconds(pid) - cpu[name]) / num_calls * _US, column=column)
        reporter.sample(f"woken.{name}", (_wakes(pid) - woken[name]) / num_calls, column=column)


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _wakes(pid: int) -> int:
    """How often its threads have slept, and so were woken."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total
