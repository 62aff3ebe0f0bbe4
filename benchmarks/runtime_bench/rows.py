"""What is measured, as data: cases, the rows of their tables, and what is asked of each figure.

A case is what one child process measures for one system; a row is one figure of it. A bound says how much better than
another column ours has to be, or how good by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "ours"
TCP = "tcp"
RAY = "ray"
MONARCH = "monarch"
RELAY = "relay"
IPC = "ipc"
PIPE = "pipe"
MEMCPY = "memcpy"
HOPS_MAIN = "hops.main"
HOPS_IO = "hops.io"
HOPS_FLIGHT = "hops.flight"

COLUMN_TITLES = {
    OURS: "ours",
    TCP: "ours, agent by tcp",
    RAY: "Ray",
    MONARCH: "Monarch",
    RELAY: "bare zmq, relay",
    IPC: "bare zmq, ipc",
    PIPE: "pipe",
    MEMCPY: "memcpy, one process",
    HOPS_MAIN: "main-thread endpoint",
    HOPS_IO: "io endpoint",
    HOPS_FLIGHT: "main-thread endpoint, 1,000 in flight",
}

SYSTEMS = ("ours", "ray", "monarch", "bare")
"""Child processes are started per case, round and system. ``bare`` measures the floors."""

DISTRIBUTIONS = {"ours": "miles", "ray": "ray", "monarch": "torchmonarch", "bare": "pyzmq"}
"""Whose version is told, and what has to be installed for a system to be measured."""

FREEZE_CAP_S = 20.0
GROUP_SIZE = 64
START_SIZE = 8


@dataclass(frozen=True, slots=True)
class Bound:
    """Ours must be at least ``factor`` times as good as ``column``; without a column, no worse than ``factor``."""

    factor: float
    column: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """All bounds of a level have to hold."""

    must: tuple[Bound, ...] = ()
    goal: tuple[Bound, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        metric: Its name in the samples of peers.
        ours: Its name in our samples, where we have more than one way.
        unit: Printed after the figure.
        cap: Peers are not waited for any longer than this; what is not there by then is printed so.
        asked: Of ours; nothing by default.
    """

    title: str
    metric: str
    unit: str
    ours: str = ""
    higher_is_better: bool = False
    cap: float | None = None
    asked: Asked = Asked()

    def metric_of(self, column: str) -> str:
        """The name of this row's samples in that column."""
        return self.ours if column in (OURS, TCP) and self.ours else self.metric


@dataclass(frozen=True, slots=True)
class Case:
    """What one child process measures. ``systems`` take part; ``columns`` of its table; ``deadline_s`` per child."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    systems: tuple[str, ...] = ("ours", "ray", "monarch")
    deadline_s: float = 180.0


def _against(ray: float | None = None, monarch: float | None = None) -> tuple[Bound, ...]:
    pairs = ((ray, RAY), (monarch, MONARCH))
    return tuple(Bound(factor, column) for factor, column in pairs if factor is not None)


def _at_most(limit: float) -> tuple[Bound, ...]:
    return (Bound(limit),)


_CALL_COLUMNS = (OURS, TCP, RAY, MONARCH, RELAY, IPC)
_ECHO = Asked(_against(4.0, 2.5), _against(6.0, 4.0))
_FLIGHT = Asked(_against(3.0), _against(6.0))
_GROUP = Asked(_against(7.0), _against(15.0))
_START = Asked(_against(4.0), _against(10.0))


def _bulk_rows() -> tuple[Row, ...]:
    rows = []
    for mib in (64, 256):
        for kind, factor in (("numpy", 1.0), ("torch", 3.0)):
            rows.append(
                Row(
                    f"{mib} MiB, {kind}",
                    f"bulk.{kind}.{mib}",
                    "MiB/s",
                    higher_is_better=True,
                    asked=Asked(_against(factor), (Bound(0.9, MEMCPY),)),
                )
            )
    return tuple(rows)


def _hop_rows() -> tuple[Row, ...]:
    rows = [Row("caller to endpoint (p50)", "there", "us"), Row("endpoint to caller (p50)", "back", "us")]
    processes = ("controller", "agent", "worker")
    rows += [Row(f"CPU time of the {process} per call", f"cpu.{process}", "us") for process in processes]
    rows += [Row(f"threads woken in the {process} per call", f"woken.{process}", "") for process in processes]
    return tuple(rows)


CASES = (
    Case(
        "echo",
        "Echo of 64 characters, one call at a time",
        (*_CALL_COLUMNS, PIPE),
        (
            Row("p50, main-thread endpoint", "echo.p50", "us", "echo.main.p50", asked=_ECHO),
            Row("p50, io endpoint", "echo.p50", "us", "echo.io.p50", asked=_ECHO),
            Row("p99, main-thread endpoint", "echo.p99", "us", "echo.main.p99"),
            Row("p99, io endpoint", "echo.p99", "us", "echo.io.p99"),
        ),
        SYSTEMS,
    ),
    Case(
        "flight",
        "1,000 calls in flight to one worker",
        _CALL_COLUMNS,
        (
            Row("main-thread endpoint", "flight", "calls/s", "flight.main", higher_is_better=True, asked=_FLIGHT),
            Row("io endpoint", "flight", "calls/s", "flight.io", higher_is_better=True, asked=_FLIGHT),
        ),
        SYSTEMS,
    ),
    Case(
        "group",
        f"One call to {GROUP_SIZE} workers of a node, until all have answered (p50)",
        (OURS, RAY, MONARCH, RELAY, IPC),
        (
            Row("main-thread endpoint", "group", "ms", "group.main", asked=_GROUP),
            Row("io endpoint", "group", "ms", "group.io", asked=_GROUP),
        ),
        SYSTEMS,
        deadline_s=400.0,
    ),
    Case("hops", "Where the time of our calls goes", (HOPS_MAIN, HOPS_IO, HOPS_FLIGHT), _hop_rows(), ("ours",)),
    Case(
        "bulk",
        "One way to another worker of the same node, until it has read every byte",
        (OURS, RAY, MONARCH, MEMCPY),
        _bulk_rows(),
        SYSTEMS,
        deadline_s=300.0,
    ),
    Case(
        "start",
        f"Controller and {START_SIZE} workers that have torch, until all have answered",
        (OURS, RAY, MONARCH),
        (
            Row("from `import` on", "start.import", "s", asked=_START),
            Row("from the first call of the library on", "start", "s", asked=_START),
        ),
    ),
    Case(
        "kill",
        "kill -9 of a worker with a call pending, until the error is at the caller",
        (OURS, RAY, MONARCH),
        (
            Row("median of a round", "kill", "ms", asked=Asked((Bound(50.0), Bound(1.0, RAY)), _at_most(5.0))),
            Row("of which until the kernel has ended the process", "kill.kernel", "ms"),
        ),
    ),
    Case(
        "freeze",
        "SIGSTOP of a worker with a call pending, until it is reported",
        (OURS, RAY, MONARCH),
        (Row("slowest of a round", "freeze", "s", cap=FREEZE_CAP_S, asked=Asked(_at_most(6.0), _at_most(3.0))),),
    ),
    Case(
        "memory",
        "Memory (PSS)",
        (OURS, RAY, MONARCH),
        (
            Row("agent", "agent", "MiB", asked=Asked(_at_most(45.0), _at_most(25.0))),
            Row(
                "controller alone, with status server", "controller", "MiB", asked=Asked(_at_most(60.0), _at_most(35.0))
            ),
            Row("all that runs on a node beside its 8 actors and the driver", "node", "MiB"),
            Row("the driver (ours: the controller), with 8 actors", "driver", "MiB"),
        ),
    ),
)
BY_NAME = {case.name: case for case in CASES}
