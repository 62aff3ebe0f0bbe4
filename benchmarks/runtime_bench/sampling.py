"""How figures are taken, the same for all systems."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from runtime_bench.child import Effort, Reporter
from runtime_bench.figures import percentile

TEXT = "x" * 64
NUM_IN_FLIGHT = 1000
MIB = 1 << 20
BULK_MIB = (64, 256)
NUM_BULK_WARM_UP = 2

_US = 1e6
_MS = 1e3


def echo(reporter: Reporter, effort: Effort, call: Callable[[], Any], metric: str = "echo", column: str = "") -> None:
    """One call after the other, each waited for by blocking."""
    for _ in range(effort.num_warm_up):
        call()
    seconds = []
    for _ in range(effort.num_calls):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    _percentiles(reporter, metric, seconds, column)


async def echo_async(
    reporter: Reporter, effort: Effort, call: Callable[[], Awaitable[Any]], metric: str, column: str
) -> None:
    """One call after the other, each awaited."""
    for _ in range(effort.num_warm_up):
        await call()
    seconds = []
    for _ in range(effort.num_calls):
        begin = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - begin)
    _percentiles(reporter, metric, seconds, column)


def _percentiles(reporter: Reporter, metric: str, seconds: list[float], column: str) -> None:
    for percent in (50, 99):
        reporter.sample(f"{metric}.p{percent}", percentile(seconds, percent) * _US, column=column)


def flight(reporter: Reporter, effort: Effort, batch: Callable[[], Any], column: str = "") -> None:
    """``batch`` makes 1,000 calls and waits for all: calls per second, of the median batch."""
    batch()
    seconds = [_timed(batch) for _ in range(effort.num_batches)]
    reporter.sample("flight", NUM_IN_FLIGHT / percentile(seconds, 50), column=column)


async def flight_async(
    reporter: Reporter, effort: Effort, batch: Callable[[], Awaitable[Any]], metric: str, column: str
) -> None:
    """The same, awaited."""
    await batch()
    seconds = [await _timed_async(batch) for _ in range(effort.num_batches)]
    reporter.sample(metric, NUM_IN_FLIGHT / percentile(seconds, 50), column=column)


def group(reporter: Reporter, effort: Effort, call: Callable[[], Any], column: str = "") -> None:
    """``call`` reaches all workers and waits for all answers."""
    for _ in range(max(3, effort.num_group_calls // 10)):
        call()
    seconds = [_timed(call) for _ in range(effort.num_group_calls)]
    reporter.sample("group", percentile(seconds, 50) * _MS, column=column)


async def group_async(reporter: Reporter, effort: Effort, call: Callable[[], Awaitable[Any]], metric: str) -> None:
    """The same, awaited."""
    for _ in range(max(3, effort.num_group_calls // 10)):
        await call()
    seconds = [await _timed_async(call) for _ in range(effort.num_group_calls)]
    reporter.sample(metric, percentile(seconds, 50) * _MS)


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


async def _timed_async(function: Callable[[], Awaitable[Any]]) -> float:
    begin = time.perf_counter()
    await function()
    return time.perf_counter() - begin


def mib_per_s(mib: int, seconds: list[float]) -> float:
    """Of the median transfer."""
    return mib / percentile(seconds, 50)


# -- bulk data: made and read the same way everywhere ----------------------------------------------------------


def payload(kind: str, mib: int) -> Any:
    """A float32 numpy array or torch tensor of so many MiB, every page of it written."""
    import numpy

    array = numpy.arange(mib * MIB // 4, dtype=numpy.float32)
    if kind == "numpy":
        return array
    import torch

    return torch.from_numpy(array)


def read_all(value: Any) -> int:
    """Read every byte of an array or tensor: the sum of its words."""
    import numpy

    array = value if isinstance(value, numpy.ndarray) else value.numpy()
    return int(numpy.add.reduce(array.reshape(-1).view(numpy.int64)))


def pss_mib(pid: int) -> float:
    """What a process takes, with pages that others share counted in parts. Raises psutil.Error."""
    import psutil

    return float(psutil.Process(pid).memory_full_info().pss) / MIB
