"""Monarch: processes of this host, actors with ``async`` endpoints (its own kind), futures waited for with ``get``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import monarch.actor
import monarch.config
from monarch.actor import Actor, endpoint, shutdown_context, this_host

from runtime_bench import sampling
from runtime_bench.child import Effort, Reporter
from runtime_bench.rows import FREEZE_CAP_S, GROUP_SIZE, START_SIZE
from runtime_bench.sampling import BULK_MIB, NUM_BULK_WARM_UP, NUM_IN_FLIGHT, TEXT


class Echo(Actor):
    """Answers with what it got."""

    @endpoint
    async def echo(self, text: str) -> str:
        return text

    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def hang(self) -> None:
        await asyncio.sleep(600)


class TorchUser(Actor):
    """Needs torch."""

    def __init__(self) -> None:
        import torch

        self.version = str(torch.__version__)

    @endpoint
    async def torch_version(self) -> str:
        return self.version


class Consumer(Actor):
    """Reads what it gets; tells when it had."""

    @endpoint
    async def take(self, value: Any) -> float:
        sampling.read_all(value)
        return time.perf_counter()


class Producer(Actor):
    """Has an array, and sends it as an argument."""

    @endpoint
    async def make(self, kind: str, mib: int) -> None:
        self.value = sampling.payload(kind, mib)

    @endpoint
    async def send(self, consumer: Any) -> float:
        begin = time.perf_counter()
        end: float = await consumer.take.call_one(self.value)
        return end - begin


def _ignore(failure: object) -> None:
    """In place of the default, which ends the program when an actor dies."""


@contextlib.contextmanager
def _processes(number: int) -> Iterator[Any]:
    monarch.actor.unhandled_fault_hook = _ignore
    try:
        yield this_host().spawn_procs(per_host={"gpus": number})
    finally:
        shutdown_context().get(timeout=30)


def _echo(reporter: Reporter, effort: Effort) -> None:
    with _processes(1) as processes:
        actor = processes.spawn("echo", Echo)
        sampling.echo(reporter, effort, lambda: actor.echo.call_one(TEXT).get())


def _flight(reporter: Reporter, effort: Effort) -> None:
    with _processes(1) as processes:
        actor = processes.spawn("echo", Echo)

        def batch() -> None:
            for future in [actor.echo.call_one(TEXT) for _ in range(NUM_IN_FLIGHT)]:
                future.get()

        sampling.flight(reporter, effort, batch)


def _group(reporter: Reporter, effort: Effort) -> None:
    # So many processes on few cores take longer to come up than its defaults allow.
    limits = (
        "host_spawn_ready_timeout",
        "mesh_proc_spawn_max_idle",
        "actor_spawn_max_idle",
        "message_delivery_timeout",
    )
    monarch.config.configure(**dict.fromkeys(limits, "300s"))
    reporter.note(f"Monarch's limits for the start of {GROUP_SIZE} processes were raised to 300 s.")
    with _processes(GROUP_SIZE) as processes:
        actors = processes.spawn("echo", Echo)
        sampling.group(reporter, effort, lambda: actors.echo.call(TEXT).get())


def _bulk(reporter: Reporter, effort: Effort) -> None:
    with _processes(2) as processes:
        producer = processes.slice(gpus=0).spawn("producer", Producer)
        consumer = processes.slice(gpus=1).spawn("consumer", Consumer)
        for kind in ("numpy", "torch"):
            for mib in BULK_MIB:
                producer.make.call_one(kind, mib).get()
                for _ in range(NUM_BULK_WARM_UP):
                    producer.send.call_one(consumer).get()
                seconds = [producer.send.call_one(consumer).get() for _ in range(effort.num_bulk)]
                reporter.sample(f"bulk.{kind}.{mib}", sampling.mib_per_s(mib, seconds))


def _start(reporter: Reporter, effort: Effort) -> None:
    imported = time.perf_counter()
    with _processes(START_SIZE) as processes:
        actors = processes.spawn("torch", TorchUser)
        actors.torch_version.call().get()
        ready = time.perf_counter()
        reporter.sample("start.import", ready - reporter.began)
        reporter.sample("start", ready - imported)


def _kill(reporter: Reporter, effort: Effort) -> None:
    seconds = []
    with _processes(1) as first:
        for number in range(effort.num_slow_kills):
            # A mesh each: the death of one rank holds up the news of the next.
            processes = this_host().spawn_procs(per_host={"gpus": 1}) if number else first
            seconds.append(_until_error(processes.spawn(f"victim{number}", Echo), signal.SIGKILL, 60.0))
    reporter.sample("kill", statistics.median(seconds) * 1e3)


def _freeze(reporter: Reporter, effort: Effort) -> None:
    with _processes(1) as processes:
        actor = processes.spawn("victim", Echo)
        pid = actor.pid.call_one().get()
        try:
            seconds = _until_error(actor, signal.SIGSTOP, FREEZE_CAP_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reporter.sample("freeze", seconds if seconds < FREEZE_CAP_S else None)


def _until_error(actor: Any, number: signal.Signals, cap_s: float) -> float:
    """Seconds from the signal to the error of a pending call; ``cap_s`` if there is none until then."""
    pid = actor.pid.call_one().get()
    pending = actor.hang.call_one()
    time.sleep(0.3)
    begin = time.perf_counter()
    os.kill(pid, number)
    try:
        pending.get(timeout=cap_s)
    except TimeoutError:
        return cap_s
    except Exception:  # noqa: BLE001  boundary: its error has no public type
        return time.perf_counter() - begin
    raise AssertionError("the call has ended without an error")


def _memory(reporter: Reporter, effort: Effort) -> None:
    import psutil

    with _processes(START_SIZE) as processes:
        actors = processes.spawn("echo", Echo)
        pids = {pid for _, pid in actors.pid.call().get().items()}
        for _ in range(effort.num_group_calls):
            actors.echo.call(TEXT).get()
        others = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in pids]
        reporter.sample("node", sum(map(sampling.pss_mib, others)))
        reporter.sample("driver", sampling.pss_mib(os.getpid()))


CASES: dict[str, Callable[[Reporter, Effort], None]] = {
    "echo": _echo,
    "flight": _flight,
    "group": _group,
    "bulk": _bulk,
    "start": _start,
    "kill": _kill,
    "freeze": _freeze,
    "memory": _memory,
}
