"""This project's own figures: controller, agent and workers as they are in a run, with keys and incarnations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop

from miles_agents import Actor, endpoint, store
from miles_agents.rpc.errors import WorkerDied
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents
from runtime_bench import our_hops, sampling
from runtime_bench.child import Effort, Reporter
from runtime_bench.rows import FREEZE_CAP_S, GROUP_SIZE, OURS, START_SIZE, TCP
from runtime_bench.sampling import BULK_MIB, NUM_BULK_WARM_UP, NUM_IN_FLIGHT, TEXT

_NODE = "node-0"
Body = Callable[[Controller, Reporter, Effort], Coroutine[Any, Any, None]]
Measure = Callable[[Any, str, str, Reporter, Effort], Coroutine[Any, Any, None]]


class Echo(Actor):
    """Answers with what it got, on either thread."""

    @endpoint
    def echo(self, text: str) -> str:
        return text

    @endpoint(thread="io")
    def echo_io(self, text: str) -> str:
        return text

    @endpoint(thread="io")
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def hang(self) -> None:
        time.sleep(600)


class TorchUser(Actor):
    """Needs torch."""

    def __init__(self) -> None:
        import torch

        self.version = str(torch.__version__)

    @endpoint
    def torch_version(self) -> str:
        return self.version


class Consumer(Actor):
    """Reads what it gets; tells when it had."""

    @endpoint
    def take(self, ref: store.Ref) -> float:
        sampling.read_all(store.get(ref))
        return time.perf_counter()


class Producer(Actor):
    """Has an array, and sends it through the store."""

    @endpoint
    def make(self, kind: str, mib: int) -> None:
        self.value = sampling.payload(kind, mib)

    @endpoint
    def send(self, consumer: Any) -> float:
        begin = time.perf_counter()
        ref = store.put(self.value)
        end: float = consumer.take.call_one(ref).get()
        store.remove(ref)
        return end - begin


class _ByTcp:
    """A controller as an agent of another machine knows it."""

    def __init__(self, controller: Controller) -> None:
        self.local_address = controller.address
        self.issue_key = controller.issue_key
        self.report_node_exit = controller.report_node_exit
        self.dismiss = controller.dismiss


@contextlib.asynccontextmanager
async def _cluster(
    num_slots: int, preload: Sequence[str] | None = None, *, by_tcp: bool = False
) -> AsyncIterator[tuple[Controller, LocalAgents]]:
    with tempfile.TemporaryDirectory() as directory:
        config = ControllerConfig(nodes=(_NODE,), run_dir=Path(directory))
        async with (
            Controller(config) as controller,
            LocalAgents(
                _ByTcp(controller) if by_tcp else controller,
                [_NODE],
                run_dir=Path(directory),
                cpu_slots=num_slots,
                preload=preload,
            ) as agents,
        ):
            await controller.wait_for_nodes()
            yield controller, agents


def _case(num_slots: int, body: Body) -> Callable[[Reporter, Effort], None]:
    async def run(reporter: Reporter, effort: Effort) -> None:
        async with _cluster(num_slots) as (controller, _):
            await body(controller, reporter, effort)

    return lambda reporter, effort: uvloop.run(run(reporter, effort))


def _both_ways(measure: Measure) -> Callable[[Reporter, Effort], None]:
    """With an agent of this machine, and with one that dials like those of others."""

    async def run(reporter: Reporter, effort: Effort) -> None:
        for column in (OURS, TCP):
            async with _cluster(1, by_tcp=column == TCP) as (controller, _):
                mesh = await controller.spawn("echo", Echo)
                for name, endpoint_ in (("main", mesh.echo), ("io", mesh.echo_io)):
                    await measure(endpoint_, name, column, reporter, effort)

    return lambda reporter, effort: uvloop.run(run(reporter, effort))


async def _echo(endpoint_: Any, name: str, column: str, reporter: Reporter, effort: Effort) -> None:
    await sampling.echo_async(reporter, effort, lambda: endpoint_.call_one(TEXT), f"echo.{name}", column)


async def _flight(endpoint_: Any, name: str, column: str, reporter: Reporter, effort: Effort) -> None:
    async def batch() -> None:
        for future in [endpoint_.call_one(TEXT) for _ in range(NUM_IN_FLIGHT)]:
            await future

    await sampling.flight_async(reporter, effort, batch, f"flight.{name}", column)


async def _group(controller: Controller, reporter: Reporter, effort: Effort) -> None:
    mesh = await controller.spawn("echo", Echo, dims={"gpus": GROUP_SIZE})
    await sampling.group_async(reporter, effort, lambda: mesh.echo.call(TEXT), "group.main")
    await sampling.group_async(reporter, effort, lambda: mesh.echo_io.call(TEXT), "group.io")


async def _hops(reporter: Reporter, effort: Effort) -> None:
    async with _cluster(1) as (controller, agents):
        await our_hops.measure(controller, _only_child(agents.agents[_NODE].pid), reporter, effort)


async def _bulk(controller: Controller, reporter: Reporter, effort: Effort) -> None:
    producer = await controller.spawn("producer", Producer)
    consumer = await controller.spawn("consumer", Consumer)
    for kind in ("numpy", "torch"):
        for mib in BULK_MIB:
            await producer.make.call_one(kind, mib)
            for _ in range(NUM_BULK_WARM_UP):
                await producer.send.call_one(consumer)
            seconds = [await producer.send.call_one(consumer) for _ in range(effort.num_bulk)]
            reporter.sample(f"bulk.{kind}.{mib}", sampling.mib_per_s(mib, seconds))


async def _start(reporter: Reporter, effort: Effort) -> None:
    imported = time.perf_counter()
    async with _cluster(START_SIZE, preload=("torch",)) as (controller, _):
        mesh = await controller.spawn("torch", TorchUser, dims={"gpus": START_SIZE}, preload=("torch",))
        await mesh.torch_version.call()
        ready = time.perf_counter()
        reporter.sample("start.import", ready - reporter.began)
        reporter.sample("start", ready - imported)


async def _kill(controller: Controller, reporter: Reporter, effort: Effort) -> None:
    until_error, until_ended = [], []
    for number in range(effort.num_kills):
        mesh = await controller.spawn(f"victim-{number}", Echo)
        pid = await mesh.pid.call_one()
        pending = mesh.hang.call_one()
        await mesh.pid.call_one()
        await asyncio.sleep(0.2)
        ended = _exit_of(pid)
        begin = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(WorkerDied):
            await pending
        until_error.append(time.perf_counter() - begin)
        until_ended.append(await ended - begin)
        await mesh.stop()
    reporter.sample("kill", statistics.median(until_error) * 1e3)
    reporter.sample("kill.kernel", statistics.median(until_ended) * 1e3)


def _exit_of(pid: int) -> asyncio.Future[float]:
    """When the kernel has ended the process: before that, nobody can know."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[float] = loop.create_future()
    fd = os.pidfd_open(pid)

    def on_exit() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        future.set_result(time.perf_counter())

    loop.add_reader(fd, on_exit)
    return future


async def _freeze(controller: Controller, reporter: Reporter, effort: Effort) -> None:
    seconds = []
    for number in range(effort.num_freezes):
        mesh = await controller.spawn(f"victim-{number}", Echo)
        pid = await mesh.pid.call_one()
        pending = mesh.hang.call_one()
        # Somewhere else between two beats each time.
        await asyncio.sleep(0.2 + number / effort.num_freezes)
        begin = time.perf_counter()
        os.kill(pid, signal.SIGSTOP)
        await controller.wait_for_event(
            lambda event, name=mesh.name: event.kind == "worker_silent" and event.subject.startswith(name),  # type: ignore[misc]
            timeout_s=FREEZE_CAP_S,
        )
        seconds.append(time.perf_counter() - begin)
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(WorkerDied):
            await pending
        await mesh.stop()
    reporter.sample("freeze", max(seconds))


async def _memory(reporter: Reporter, effort: Effort) -> None:
    async with _cluster(START_SIZE) as (controller, agents):
        reaper = agents.agents[_NODE].pid
        agent = _only_child(reaper)
        reporter.sample("agent", sampling.pss_mib(agent))
        mesh = await controller.spawn("echo", Echo, dims={"gpus": START_SIZE})
        for _ in range(effort.num_group_calls):
            await mesh.echo.call(TEXT)
        workers = set((await mesh.pid.call()).values)
        reporter.sample("node", sum(sampling.pss_mib(pid) for pid in _below(reaper) - workers))
        reporter.sample("driver", sampling.pss_mib(os.getpid()))


def _measure_memory(reporter: Reporter, effort: Effort) -> None:
    uvloop.run(_memory(reporter, effort))
    command = [sys.executable, "-m", "runtime_bench.lone_controller"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as lone:
        assert lone.stdout is not None
        about = json.loads(lone.stdout.readline())
        request = urllib.request.Request(
            about["url"] + "/status", headers={"Authorization": f"Bearer {about['token']}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()
        reporter.sample("controller", sampling.pss_mib(lone.pid))
        lone.communicate(timeout=30)


def _only_child(pid: int) -> int:
    (child,) = psutil.Process(pid).children()
    return int(child.pid)


def _below(pid: int) -> set[int]:
    """Pids of a process and all its descendants."""
    return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}


CASES: dict[str, Callable[[Reporter, Effort], None]] = {
    "echo": _both_ways(_echo),
    "flight": _both_ways(_flight),
    "group": _case(GROUP_SIZE, _group),
    "hops": lambda reporter, effort: uvloop.run(_hops(reporter, effort)),
    "bulk": _case(2, _bulk),
    "start": lambda reporter, effort: uvloop.run(_start(reporter, effort)),
    "kill": _case(1, _kill),
    "freeze": _case(1, _freeze),
    "memory": _measure_memory,
}
