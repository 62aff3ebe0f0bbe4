"""Processes that grade, with a deadline: one that is too slow, or dies, is replaced; its answer counts as wrong.

Consumes pairs of answers; produces verdicts. Waits for a grader, for at most the deadline. Invariants: an answer that
makes a grader hang or die costs that grader only; the caller's loop is never blocked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)
DEADLINE_S = 5.0
START_TIMEOUT_S = 60.0


class Grader:
    """One process. Used by one thread at a time."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "miles.rollout.rm_hub.grader"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env,
        )  # fmt: skip
        self._left = b""
        self.pid = self._process.pid
        self.is_ready = self._read(START_TIMEOUT_S) is not None

    def ask(self, given: str, expected: str, deadline_s: float) -> bool | None:
        """Whether they are equal; None if there is no answer in time: then this grader is of no more use."""
        request = json.dumps({"given": given, "expected": expected, "deadline_s": deadline_s}) + "\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode())
        except OSError:
            return None
        answer = self._read(deadline_s)
        return None if answer is None else bool(answer["equal"])

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._left:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            data = self._process.stdout.read(65536)
            if not data:
                return None
            self._left += data
        line, _, self._left = self._left.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class GraderPool:
    """See the module's docstring."""

    def __init__(self, size: int = 0, deadline_s: float = DEADLINE_S) -> None:
        self.size = size or max(1, min(4, os.cpu_count() or 1))
        self.deadline_s = deadline_s
        self.num_lost = 0
        self._idle: list[Grader] = []
        self._lock = threading.Lock()
        self._closed = False
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="grading")

    async def equal(self, given: str, expected: str) -> bool:
        """Whether two answers are equal by algebra; False if that cannot be told in time."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._equal, given, expected)

    def _equal(self, given: str, expected: str) -> bool:
        with self._lock:
            grader = self._idle.pop() if self._idle else None
        grader = grader or Grader()
        verdict = grader.ask(given, expected, self.deadline_s) if grader.is_ready else None
        if verdict is None:
            self.num_lost += 1
            logger.warning("no verdict within %.1f s on the answer %.100r; it counts as wrong", self.deadline_s, given)
            grader.close()
            return False
        with self._lock:
            if not self._closed:
                self._idle.append(grader)
                return verdict
        grader.close()
        return verdict

    def pids(self) -> list[int]:
        """Of the graders that wait for work."""
        with self._lock:
            return [grader.pid for grader in self._idle]

    def close(self) -> None:
        """End all graders."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for grader in idle:
            grader.close()
        self._threads.shutdown(wait=True, cancel_futures=True)


_pool: GraderPool | None = None
_pool_lock = threading.Lock()


def grader_pool() -> GraderPool:
    """The pool of this process, made on first use."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = GraderPool()
        return _pool


def close_grader_pool() -> None:
    """End the pool of this process."""
    global _pool
    with _pool_lock:
        pool, _pool = _pool, None
    if pool is not None:
        pool.close()
