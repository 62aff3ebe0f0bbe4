"""Run a function on several ranks: processes forked from one that has torch and megatron imported already.

A directory's tests begin the warm process in their ``conftest.py``, before any module's check for leaks::

    @pytest.fixture(scope="session", autouse=True)
    def ranks():
        with warm_process():
            yield

and a test calls ``run_ranks(2, function, ...)``. Ranks never come from the test process itself: after a first backward
it has threads, and a fork would copy their locks and not them.
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
from pathlib import Path
from typing import Any

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
    assert _connection is not None, "begin `warm_process()` in the conftest.py of these tests"
    source = Path(function.__code__.co_filename)
    request = Request(
        world_size, function.__module__, str(source), function.__qualname__, pickle.dumps(args), timeout_s, distributed
    )
    _connection.settimeout(timeout_s + EXTRA_S)
    send(_connection, request)
    answer: Answer = receive(_connection)
    if answer.failure:
        raise RanksFailed(answer.failure)
    return [pickle.loads(result) for result in answer.results]


_connection: socket.socket | None = None
_users = 0


@contextmanager
def warm_process() -> Iterator[None]:
    """Have the warm process. Several users share one; it ends with the last."""
    global _connection, _users
    if _users == 0:
        process, _connection = _start()
        _process.append(process)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if _users == 0 and _connection is not None:
            _connection.close()
            _connection = None
            _end(_process.pop())


_process: list[subprocess.Popen[bytes]] = []


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "TORCHDYNAMO_DISABLE": "1"}
    env["HF_HUB_OFFLINE"] = "1"
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "support.warm_ranks", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=env,
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
