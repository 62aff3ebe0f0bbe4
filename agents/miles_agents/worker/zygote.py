"""The zygote: a process with everything imported that workers need, which forks them. docs/design.md, "Fast start".

Consumes: the agent's batches of starts on the control socket. Produces: its verdict on itself; workers, each of which
is the agent's own child by the time that it does anything. Waits for: the agent, whose end is the end of the socket and
of this process; M and a new worker wait for the agent's words on the worker's line, ``STEP_S`` at most.

Invariants: no user code but the modules that were named runs here; one thread, no child process, no GPU; it is no
subreaper, so what M leaves becomes the agent's; nothing is shared with a worker but memory that neither writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from miles_agents.agent import exec_shim
from miles_agents.worker.own_process import name_process, set_up_logging, with_entries
from miles_agents.worker.zygote_safety import Holdings, other_threads, why_unsafe
from miles_agents.worker.zygote_talk import (
    GO,
    HERE,
    LEAVE,
    MAX_BATCH,
    MAX_MESSAGE,
    Start,
    Verdict,
    Wishes,
    born,
)

STEP_S = 15.0
"""How long M and a new worker wait for the agent; it has given them up before."""
EXIT_GIVEN_UP = 126


@dataclass(frozen=True, slots=True)
class _Order:
    """What came for one worker. ``start`` is read by the worker only: no sibling has its secrets in memory."""

    start: int
    log: int
    line: socket.socket


def serve(control_fd: int, modules: Sequence[str]) -> bytes:
    """Be a zygote. Returns only in workers: their packed ``Birth``."""
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    message = control.recv(MAX_MESSAGE)
    if not message:
        os._exit(0)
    wishes = Wishes.unpack(message)
    set_up_logging()
    name_process(f"zygote {'+'.join(modules) or 'runtime'}")
    missing = next((name for name in modules if not _is_there(name)), "") if not wishes.sys_path else ""
    if missing:
        _leave(control, Verdict(missing=missing))
    sys.path[:] = with_entries(sys.path, wishes.sys_path)
    before = Holdings.now()
    refusal = _import_all(("miles_agents.worker.main", *wishes.also, *modules)) or why_unsafe(before)
    if refusal:
        _leave(control, Verdict(refusal=refusal))
    _prepare_to_fork()
    control.send(Verdict().pack())
    return _fork_for_ever(control, wishes.agent)


def _is_there(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _import_all(modules: Sequence[str]) -> str:
    """Why it failed, or "". The whole traceback goes to the log."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001  boundary: somebody else's module
            sys.excepthook(type(error), error, error.__traceback__)
            return f"importing {name} failed: {type(error).__name__}: {error}"
    return ""


def _leave(control: socket.socket, verdict: Verdict) -> NoReturn:
    control.send(verdict.pack())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread that refuses to end shall not keep it


def _prepare_to_fork() -> None:
    # What M leaves has to become the agent's, not this process's.
    if ctypes.CDLL(None, use_errno=True).prctl(exec_shim.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps M, after it gave M's children away
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # else the first collection of each worker would copy every page that holds an object


def _fork_for_ever(control: socket.socket, agent: int) -> bytes:
    while True:
        orders = _receive(control)
        if other_threads():
            _refuse(orders, b"threads 0")
            continue
        try:
            pid = os.fork()
        except OSError as error:
            _refuse(orders, f"fork {error.errno}".encode())
            continue
        if pid == 0:
            control.close()
            return _be_midwife(orders, agent)
        for order in orders:
            _let_go(order)


def _receive(control: socket.socket) -> list[_Order]:
    """The next batch. Ends this process when the agent has closed the socket."""
    message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 3 * MAX_BATCH)
    if not message:
        os._exit(0)
    starts, logs, lines = fds[::3], fds[1::3], fds[2::3]
    return [
        _Order(start, log, socket.socket(fileno=line)) for start, log, line in zip(starts, logs, lines, strict=True)
    ]


def _refuse(orders: Sequence[_Order], words: bytes) -> None:
    for order in orders:
        _say(order.line, words)
        _let_go(order)


def _let_go(order: _Order) -> None:
    os.close(order.start)
    os.close(order.log)
    order.line.close()


def _say(line: socket.socket, words: bytes) -> None:
    with contextlib.suppress(OSError):  # the agent has given this start up
        line.send(words)


def _be_midwife(orders: Sequence[_Order], agent: int) -> bytes:
    """M: fork the workers, wait until the agent knows them all, end. Returns in the workers."""
    midwife = os.getpid()
    made: list[tuple[socket.socket, int]] = []
    for order in orders:
        try:
            pid = os.fork()
        except OSError as error:
            _say(order.line, f"fork {error.errno}".encode())
            continue
        if pid == 0:
            for other in orders:
                if other is not order:
                    _let_go(other)
            for _, worker in made:
                os.close(worker)
            return _be_born(order, midwife, agent)
        try:
            made.append((order.line, os.pidfd_open(pid)))
        except OSError:  # it is dead and reaped already, or cannot be watched: the agent is to see the end of its line
            order.line.close()
    wait_for_leave(made)
    os._exit(0)


def wait_for_leave(made: Sequence[tuple[socket.socket, int]]) -> None:
    """For each line and pidfd of a worker: until the agent has said it, or closed the line, or the worker died.

    The line of a dead worker is closed, so that the agent hears of it now: its siblings wait for the end of M.
    """
    waiting = {fd: (line, worker) for line, worker in made for fd in (line.fileno(), worker)}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + STEP_S
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            if fd not in waiting:  # the other one of the two was ready as well
                continue
            line, worker = waiting[fd]
            for each in (line.fileno(), worker):
                poll.unregister(each)
                del waiting[each]
            if fd == worker:
                line.close()
            else:
                with contextlib.suppress(OSError):  # closed with a word of ours unread
                    line.recv(MAX_MESSAGE)


def _be_born(order: _Order, midwife: int, agent: int) -> bytes:
    """G: become a child of the agent, then what ``exec_shim`` makes of any child. Returns the packed ``Birth``."""
    try:
        line = order.line
        os.setsid()
        _outlive(midwife, line)
        exec_shim.bind_life_to_parent(agent)
        line.send(HERE)
        _wait_for_go(line)
        os.dup2(order.log, 1)
        os.dup2(order.log, 2)
        os.close(order.log)
        with open(order.start, "rb") as file:
            start = Start.unpack(file.read())
        _become(start)
        line.send(exec_shim.STARTED)
        line.close()
    except exec_shim.Failure as failure:
        _say(order.line, f"{failure.stage} {failure.errno}".encode())
        os._exit(exec_shim.EXIT_NOT_STARTED)
    except OSError as error:  # the agent has given this start up
        exec_shim.say(f"the hand-over failed: {error}")
        os._exit(EXIT_GIVEN_UP)
    except Exception as error:  # noqa: BLE001  boundary: a start that cannot be; the zygote is not to blame
        exec_shim.say(f"cannot become a worker: {error!r}")
        _say(order.line, b"settle 0")
        os._exit(exec_shim.EXIT_NOT_STARTED)
    return start.birth


def _outlive(midwife: int, line: socket.socket) -> None:
    """Introduce ourselves, and wait for the end of M: readable is its pidfd only after its children were given away."""
    try:
        gone = os.pidfd_open(midwife)
    except ProcessLookupError:
        os._exit(EXIT_GIVEN_UP)
    if os.getppid() != midwife:  # it was killed just now, and the agent knows nothing of us
        os._exit(EXIT_GIVEN_UP)
    with open("/proc/self/stat", "rb") as file:
        start_time = int(file.read().rpartition(b")")[2].split()[19])
    line.send(born(os.getpid(), start_time))
    if not select.select([gone], [], [], STEP_S)[0]:
        os._exit(EXIT_GIVEN_UP)
    os.close(gone)


def _wait_for_go(line: socket.socket) -> None:
    line.settimeout(STEP_S)
    while True:
        word = line.recv(MAX_MESSAGE)
        if word == GO:
            return
        if word != LEAVE:  # left unread if M was killed; the end of the line otherwise
            os._exit(EXIT_GIVEN_UP)


def _become(start: Start) -> None:
    """A process as after exec: environment, place, limits, signals, seeds, arguments."""
    coerced = os.environ.get("LC_CTYPE")  # by the interpreter, where the environment has no locale
    os.environ.clear()
    os.environ.update({"LC_CTYPE": coerced} if coerced is not None else {})
    os.environ.update(start.env)
    exec_shim.settle(start.options)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # all others are as at exec, or as an import set them
    random = sys.modules.get("numpy.random")  # ``random`` seeds itself anew after a fork
    if random is not None:
        random.seed()
    sys.argv[1:] = []
    sys.orig_argv[:] = [sys.executable, "-m", "miles_agents.worker"]
