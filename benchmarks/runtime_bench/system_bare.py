"""Floors: what ZeroMQ and the memory give without a runtime. No names, no sessions, no deadlines, no errors.

``relay``: controller - agent - worker in three processes, tcp with CURVE between the first two and ipc between the
last two, as in a run. ``ipc``: controller and worker, directly. ``pipe``: two processes that wake each other.
``memcpy``: one process copies and reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq

from runtime_bench import sampling
from runtime_bench.child import Effort, Reporter
from runtime_bench.rows import GROUP_SIZE, IPC, MEMCPY, PIPE, RELAY
from runtime_bench.sampling import BULK_MIB, NUM_IN_FLIGHT, TEXT

_BODY = TEXT.encode()
_ANSWER_MS = 30_000


@dataclass(frozen=True, slots=True)
class _Keys:
    """Of the controller and the agent, each ``(public, secret)``."""

    controller: tuple[bytes, bytes]
    agent: tuple[bytes, bytes]


class _Controller:
    """The near end: sends to workers and takes what comes back.

    ``prefix`` holds the frames before the worker's name: the agent's, if there is one.
    """

    def __init__(self, socket: zmq.Socket[bytes], prefix: list[bytes], num_workers: int) -> None:
        self.socket = socket
        self.prefix = prefix
        self.workers = [b"w%d" % number for number in range(num_workers)]
        socket.setsockopt(zmq.RCVTIMEO, _ANSWER_MS)

    def send(self, worker: bytes) -> None:
        self.socket.send_multipart([*self.prefix, worker, _BODY])

    def take(self, number: int) -> None:
        for _ in range(number):
            self.socket.recv_multipart()

    def call(self) -> None:
        """One call to the first worker."""
        self.send(self.workers[0])
        self.take(1)

    def batch(self) -> None:
        """1,000 calls in flight."""
        for _ in range(NUM_IN_FLIGHT):
            self.send(self.workers[0])
        self.take(NUM_IN_FLIGHT)

    def call_all_through_agent(self) -> None:
        """One message, which the agent hands to every worker."""
        self.send(b"all")
        self.take(len(self.workers))

    def call_all(self) -> None:
        """A message each."""
        for worker in self.workers:
            self.send(worker)
        self.take(len(self.workers))


def _router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _unbounded(socket)
    return socket


def _dealer(context: zmq.Context[zmq.Socket[bytes]], name: bytes) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, name)
    _unbounded(socket)
    return socket


def _unbounded(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)


def _worker(address: str, number: int) -> None:
    socket = _dealer(zmq.Context(), b"w%d" % number)
    socket.connect(address)
    socket.send(b"hello")
    while True:
        socket.send(socket.recv())


def _agent(address: str, controller: str, keys: _Keys, workers: list[bytes]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inner = _router(context)
    inner.bind(address)
    outer = _dealer(context, b"agent")
    outer.curve_publickey, outer.curve_secretkey = keys.agent
    outer.curve_serverkey = keys.controller[0]
    outer.connect(controller)
    poller = zmq.Poller()
    poller.register(inner, zmq.POLLIN)
    poller.register(outer, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if outer in ready:
            worker, body = outer.recv_multipart()
            for name in workers if worker == b"all" else [worker]:
                inner.send_multipart([name, body])
        if inner in ready:
            outer.send_multipart(inner.recv_multipart())


@contextlib.contextmanager
def _forked(*mains: Callable[[], None]) -> Iterator[None]:
    """A process each, made before this one has a context of its own."""
    pids = []
    for main in mains:
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                main()
            finally:
                os._exit(1)
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextlib.contextmanager
def _relay(num_workers: int) -> Iterator[_Controller]:
    keys = _Keys(zmq.curve_keypair(), zmq.curve_keypair())
    names = [b"w%d" % number for number in range(num_workers)]
    with tempfile.TemporaryDirectory() as directory:
        inner = f"ipc://{Path(directory) / 'agent'}"
        outer = f"tcp://127.0.0.1:{_free_port()}"
        mains = [lambda number=number: _worker(inner, number) for number in range(num_workers)]
        with _forked(lambda: _agent(inner, outer, keys, names), *mains), zmq.Context() as context:
            socket = _router(context)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys.controller
            socket.bind(outer)
            with socket:
                controller = _Controller(socket, [b"agent"], num_workers)
                controller.take(num_workers)  # hellos
                yield controller


@contextlib.contextmanager
def _direct(num_workers: int) -> Iterator[_Controller]:
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{Path(directory) / 'controller'}"
        mains = [lambda number=number: _worker(address, number) for number in range(num_workers)]
        with _forked(*mains), zmq.Context() as context, _router(context) as socket:
            socket.bind(address)
            controller = _Controller(socket, [], num_workers)
            controller.take(num_workers)
            yield controller


@contextlib.contextmanager
def _pipe() -> Iterator[Callable[[], None]]:
    """A call that goes to another process by a pipe and comes back by another."""
    (far_in, near_out), (near_in, far_out) = os.pipe(), os.pipe()

    def far_end() -> None:
        while True:
            os.write(far_out, os.read(far_in, len(_BODY)))

    def call() -> None:
        os.write(near_out, _BODY)
        os.read(near_in, len(_BODY))

    with _forked(far_end):
        yield call


def _free_port() -> int:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return int(socket.bind_to_random_port("tcp://127.0.0.1"))


def _echo(reporter: Reporter, effort: Effort) -> None:
    for column, connect in ((RELAY, _relay), (IPC, _direct)):
        with connect(1) as controller:
            sampling.echo(reporter, effort, controller.call, column=column)
    with _pipe() as call:
        sampling.echo(reporter, effort, call, column=PIPE)


def _flight(reporter: Reporter, effort: Effort) -> None:
    for column, connect in ((RELAY, _relay), (IPC, _direct)):
        with connect(1) as controller:
            sampling.flight(reporter, effort, controller.batch, column=column)


def _group(reporter: Reporter, effort: Effort) -> None:
    with _relay(GROUP_SIZE) as controller:
        sampling.group(reporter, effort, controller.call_all_through_agent, column=RELAY)
    with _direct(GROUP_SIZE) as controller:
        sampling.group(reporter, effort, controller.call_all, column=IPC)


def _bulk(reporter: Reporter, effort: Effort) -> None:
    """A copy into memory that is there already, and the reading of it."""
    import numpy

    for mib in BULK_MIB:
        source = sampling.payload("numpy", mib)
        target = numpy.empty_like(source)
        numpy.copyto(target, source)
        seconds = []
        for _ in range(effort.num_bulk):
            begin = time.perf_counter()
            numpy.copyto(target, source)
            sampling.read_all(target)
            seconds.append(time.perf_counter() - begin)
        for kind in ("numpy", "torch"):
            reporter.sample(f"bulk.{kind}.{mib}", sampling.mib_per_s(mib, seconds), column=MEMCPY)


CASES: dict[str, Callable[[Reporter, Effort], None]] = {
    "echo": _echo,
    "flight": _flight,
    "group": _group,
    "bulk": _bulk,
}
