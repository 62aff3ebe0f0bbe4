"""Run a function on several ranks: processes forked from one that has torch and megatron imported already.

A directory's tests may have the warm process by their ``conftest.py``::

    @pytest.fixture(scope="session", autouse=True)
    def ranks():
        with warm_process():
            yield

and a test calls ``run_ranks(2, function, ...)``. The first such call starts the process, which takes seconds: tests
that need no ranks do not pay for it. It lasts to the end of the session, and is no leak of the module that came first.
Ranks never come from the test process itself: after a first backward it has threads, and a fork would copy their locks
and not them.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.leaks import forget, keep
from support.warm_ranks import Answer, Request, receive, send

TESTS = Path(__file__).parents[1]
START_TIMEOUT_S = 120.0
EXTRA_S = 15.0
"""What the warm process may take beyond the ranks' own time limit, to tell and to end them."""


class RanksFailed(AssertionError):
    """A rank raised, died or took too long. The text holds its traceback and the end of what it wrote."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0, distributed: bool = True
) -> list[Any]:
    """Results of ``function(*args)`` by rank.

    Args:
        function: Of a module's top level. It runs with ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` set and, unless
            ``distributed`` is false, with ``torch.distributed`` initialised (gloo).
        args: And the results: whatever pickle takes. Tensors are copied.

    Raises:
        RanksFailed: At the first rank that fails. No rank runs any more.
    """
    connection = _warm_connection()
    source = Path(function.__code__.co_filename)
    request = Request(
        world_size, function.__module__, str(source), function.__qualname__, pickle.dumps(args), timeout_s, distributed
    )
    connection.settimeout(timeout_s + EXTRA_S)
    send(connection, request)
    answer: Answer = receive(connection)
    if answer.failure:
        raise RanksFailed(answer.failure)
    return [pickle.loads(result) for result in answer.results]


@dataclass(frozen=True)
class _Warm:
    process: subprocess.Popen[bytes]
    connection: socket.socket


_warm: list[_Warm] = []
_users: list[dict[str, str]] = []
"""The environment as each of them found it: a test that changes it does not change that of later ranks."""


@contextmanager
def warm_process() -> Iterator[None]:
    """Have the warm process, from the first ``run_ranks`` on. Several users share one; it ends with the last."""
    _users.append(dict(os.environ))
    try:
        yield
    finally:
        _users.pop()
        if not _users and _warm:
            warm = _warm.pop()
            warm.connection.close()
            _end(warm.process)
            forget(warm.process.pid)


def _warm_connection() -> socket.socket:
    assert _users, "have `warm_process()` in the conftest.py of these tests"
    if not _warm:
        process, connection = _start(_users[0])
        _warm.append(_Warm(process, connection))
        keep(process.pid, connection.fileno())
    return _warm[0].connection


def _start(environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    env = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "TORCHDYNAMO_DISABLE": "1"}
    env["HF_HUB_OFFLINE"] = "1"
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "support.warm_ranks", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=env,
            cwd=TESTS.parent,
            stdin=subprocess.DEVNULL,
        )
    ours.settimeout(START_TIMEOUT_S)
    try:
        assert receive(ours) == "ready"
    except BaseException:
        ours.close()
        process.kill()
        process.wait()
        raise
    return process, ours


def _end(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.01)
