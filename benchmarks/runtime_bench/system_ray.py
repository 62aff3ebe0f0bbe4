"""Ray: a local instance without dashboard, actors with plain methods."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from runtime_bench import sampling
from runtime_bench.child import Effort, Reporter
from runtime_bench.rows import FREEZE_CAP_S, GROUP_SIZE, START_SIZE
from runtime_bench.sampling import BULK_MIB, NUM_BULK_WARM_UP, NUM_IN_FLIGHT, TEXT


class Echo:
    """Answers with what it got."""

    def echo(self, text: str) -> str:
        return text

    def pid(self) -> int:
        return os.getpid()

    def niceness(self) -> int:
        return os.nice(0)

    def hang(self) -> None:
        time.sleep(600)


class TorchUser:
    """Needs torch."""

    def __init__(self) -> None:
        import torch

        self.version = str(torch.__version__)

    def torch_version(self) -> str:
        return self.version


class Consumer:
    """Reads what it gets; tells when it had."""

    def take(self, value: Any) -> float:
        sampling.read_all(value)
        return time.perf_counter()


class Producer:
    """Has an array, and sends it."""

    def make(self, kind: str, mib: int) -> None:
        self.value = sampling.payload(kind, mib)

    def send(self, consumer: Any) -> float:
        begin = time.perf_counter()
        end: float = ray.get(consumer.take.remote(ray.put(self.value)))
        return end - begin


def _start(actor: type) -> Any:
    """An actor that takes no CPU slot: there may be more of them than cores."""
    return ray.remote(num_cpus=0)(actor).remote()


@contextlib.contextmanager
def _cluster(num_cpus: int = START_SIZE) -> Iterator[None]:
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 << 30,
        _temp_dir=os.environ["RAY_TMPDIR"],
    )
    try:
        yield
    finally:
        ray.shutdown()


def _case(body: Callable[[Reporter, Effort], None]) -> Callable[[Reporter, Effort], None]:
    def run(reporter: Reporter, effort: Effort) -> None:
        with _cluster():
            body(reporter, effort)

    return run


def _echo(reporter: Reporter, effort: Effort) -> None:
    actor = _start(Echo)
    reporter.note(f"Ray's workers ran at niceness {ray.get(actor.niceness.remote())}; its default is 15.")
    sampling.echo(reporter, effort, lambda: ray.get(actor.echo.remote(TEXT)))


def _flight(reporter: Reporter, effort: Effort) -> None:
    actor = _start(Echo)
    sampling.flight(reporter, effort, lambda: ray.get([actor.echo.remote(TEXT) for _ in range(NUM_IN_FLIGHT)]))


def _group(reporter: Reporter, effort: Effort) -> None:
    actors = [_start(Echo) for _ in range(GROUP_SIZE)]
    ray.get([actor.pid.remote() for actor in actors])
    sampling.group(reporter, effort, lambda: ray.get([actor.echo.remote(TEXT) for actor in actors]))


def _bulk(reporter: Reporter, effort: Effort) -> None:
    producer, consumer = _start(Producer), _start(Consumer)
    for kind in ("numpy", "torch"):
        for mib in BULK_MIB:
            ray.get(producer.make.remote(kind, mib))
            for _ in range(NUM_BULK_WARM_UP):
                ray.get(producer.send.remote(consumer))
            seconds = [ray.get(producer.send.remote(consumer)) for _ in range(effort.num_bulk)]
            reporter.sample(f"bulk.{kind}.{mib}", sampling.mib_per_s(mib, seconds))


def _first_answers(reporter: Reporter, effort: Effort) -> None:
    imported = time.perf_counter()
    with _cluster():
        actors = [_start(TorchUser) for _ in range(START_SIZE)]
        ray.get([actor.torch_version.remote() for actor in actors])
        ready = time.perf_counter()
        reporter.sample("start.import", ready - reporter.began)
        reporter.sample("start", ready - imported)


def _kill(reporter: Reporter, effort: Effort) -> None:
    seconds = []
    for _ in range(effort.num_kills):
        actor = _start(Echo)
        pid = ray.get(actor.pid.remote())
        pending = actor.hang.remote()
        time.sleep(0.3)
        begin = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(pending)
        seconds.append(time.perf_counter() - begin)
    reporter.sample("kill", statistics.median(seconds) * 1e3)


def _freeze(reporter: Reporter, effort: Effort) -> None:
    actor = _start(Echo)
    pid = ray.get(actor.pid.remote())
    pending = actor.hang.remote()
    time.sleep(0.3)
    begin = time.perf_counter()
    os.kill(pid, signal.SIGSTOP)
    try:
        ray.get(pending, timeout=FREEZE_CAP_S)
    except ray.exceptions.GetTimeoutError:
        reporter.sample("freeze", None)
    except ray.exceptions.RayActorError:
        reporter.sample("freeze", time.perf_counter() - begin)
    finally:
        os.kill(pid, signal.SIGKILL)


def _memory(reporter: Reporter, effort: Effort) -> None:
    import psutil

    actors = [_start(Echo) for _ in range(START_SIZE)]
    pids = set(ray.get([actor.pid.remote() for actor in actors]))
    for _ in range(effort.num_group_calls):
        ray.get([actor.echo.remote(TEXT) for actor in actors])
    others = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in pids]
    total = 0.0
    for pid in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sampling.pss_mib(pid)
    reporter.sample("node", total)
    reporter.sample("driver", sampling.pss_mib(os.getpid()))


CASES: dict[str, Callable[[Reporter, Effort], None]] = {
    "echo": _case(_echo),
    "flight": _case(_flight),
    "group": _case(_group),
    "bulk": _case(_bulk),
    "start": _first_answers,
    "kill": _case(_kill),
    "freeze": _case(_freeze),
    "memory": _case(_memory),
}
