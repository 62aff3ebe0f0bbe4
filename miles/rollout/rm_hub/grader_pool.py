"""Processes that grade, with a deadline: one that is too slow, or dies, is replaced; its answer counts as wrong.

Consumes pairs of answers; produces verdicts. Waits for a grader until it has used the deadline's seconds of processor
time, so that a right answer stays right on a machine that is busy; for ten times as long by the clock. Invariants: an
answer that makes a grader hang or die costs that grader only; an answer that did so twice is not tried again; the
caller's loop is never blocked; no grader outlives the pool, nor its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from miles_agents.errors import EnvironmentFault

logger = logging.getLogger(__name__)
DEADLINE_S = 5.0
"""Of processor time."""
PATIENCE = 10.0
"""So many deadlines by the clock are waited for a grader that gets no processor."""
LOOK_EVERY_S = 0.05
START_TIMEOUT_S = 60.0
STARTS = 3
END_S = 2.0
KEPT = 20_000
MOST_LOSSES = 2
COMMAND = (sys.executable, "-m", "miles.rollout.rm_hub.grader")


class NoGrader(EnvironmentFault):
    """No grading process can be started."""

    code = "E-ROLL-018"


class Grader:
    """One process. Used by one thread at a time."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and os.path.isdir(path))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env,
        )  # fmt: skip
        self._left = b""
        self._is_ending = False
        self.pid = self._process.pid
        self.is_ready = self._read(START_TIMEOUT_S) is not None

    def ask(self, given: str, expected: str, deadline_s: float) -> bool | None:
        """Whether they are equal; None if there is no answer in time: then this grader is of no more use."""
        wall_s = PATIENCE * deadline_s
        request = json.dumps({"given": given, "expected": expected, "cpu_s": deadline_s, "wall_s": wall_s}) + "\n"
        cpu_end = self._cpu_s() + deadline_s
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode())  # shorter than a pipe holds, so that it does not wait
        except OSError:
            return None
        answer = self._read(wall_s, cpu_end)
        return None if answer is None else bool(answer["equal"])

    def _cpu_s(self) -> float:
        """Processor time that it has used; without end if it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.inf
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self, timeout_s: float, cpu_end: float = math.inf) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._left:
            left_s = max(0.0, min(deadline - time.monotonic(), cpu_end - self._cpu_s()))
            wait_s = min(max(left_s, LOOK_EVERY_S), max(0.0, deadline - time.monotonic()))
            if not poll.poll(wait_s * 1000):
                if left_s <= 0.0:
                    return None
                continue
            data = self._process.stdout.read(65536)
            if not data:
                self._is_ending = True
                return None
            self._left += data
        line, _, self._left = self._left.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End the process. Whoever reads its answer gets none. From any thread."""
        self._process.kill()

    def close(self) -> int:
        """End the process and forget it: its exit code, negative for a signal; 0 if it did not end by itself."""
        if self._is_ending:  # it has closed its output
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        code = self._process.poll()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return code or 0


class GraderPool:
    """See the module's docstring."""

    def __init__(self, size: int = 0, deadline_s: float = DEADLINE_S, command: Sequence[str] = COMMAND) -> None:
        self.size = size or max(1, min(4, os.cpu_count() or 1))
        self.deadline_s = deadline_s
        self.num_lost = 0
        self._command = command
        self._idle: list[Grader] = []
        self._busy: set[Grader] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._known: OrderedDict[tuple[str, str], bool | int] = OrderedDict()
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="grading")

    async def equal(self, given: str, expected: str) -> bool:
        """Whether two answers are equal by algebra; False if that cannot be told in time.

        Raises:
            NoGrader.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._equal, given, expected)

    def equal_now(self, given: str, expected: str) -> bool:
        """``equal`` for ordinary code: it waits."""
        return self._threads.submit(self._equal, given, expected).result()

    def _equal(self, given: str, expected: str) -> bool:
        pair = (given, expected)
        with self._lock:
            known = self._known.get(pair, 0)
        if known is True or known is False:
            return known
        if known >= MOST_LOSSES:
            return False
        grader = self._grader()
        if grader is None:
            return False
        verdict = grader.ask(given, expected, self.deadline_s)
        with self._lock:
            self._busy.discard(grader)
            self._remember(pair, known + 1 if verdict is None else verdict)
            keep = verdict is not None and not self._closed
            if keep:
                self._idle.append(grader)
        if not keep:
            code = grader.close()
            if verdict is None and not self._closed:
                self._tell_lost(given, code)
        return bool(verdict)

    def _remember(self, pair: tuple[str, str], verdict: bool | int) -> None:
        self._known[pair] = verdict
        if len(self._known) > KEPT:
            self._known.popitem(last=False)

    def _tell_lost(self, given: str, code: int) -> None:
        with self._lock:
            self.num_lost += 1
            count = self.num_lost
        _count_lost()
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: a policy may produce thousands of these
            limit = f"{self.deadline_s:.1f} s of processor time, or {PATIENCE * self.deadline_s:.1f} s"
            how = f"took longer than {limit}" if not code else f"ended its grader ({code})"
            logger.warning("the answer %.100r %s and counts as wrong (%d such answers so far)", given, how, count)

    def _grader(self) -> Grader | None:
        """One for this thread, from now on busy; None: the pool is closed."""
        for _ in range(STARTS):
            with self._lock:
                if self._closed:
                    return None
                if self._idle:
                    grader = self._idle.pop()
                    self._busy.add(grader)
                    return grader
            grader = Grader(self._command)
            with self._lock:
                if grader.is_ready and not self._closed:
                    self._busy.add(grader)
                    return grader
            code = grader.close()
        raise NoGrader(
            "no process for grading can be started",
            evidence=f"{' '.join(self._command)}: {STARTS} attempts; the last "
            + (f"ended with {code}" if code else f"was not ready within {START_TIMEOUT_S:.0f} s"),
            advice="Look at this process's log: the grader's own message is there. Memory is the usual reason.",
        )

    def pids(self) -> list[int]:
        """Of all graders."""
        with self._lock:
            return [grader.pid for grader in (*self._idle, *self._busy)]

    def close(self) -> None:
        """End all graders. Answers that are being graded count as wrong."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for grader in self._busy:
                grader.kill()
        for grader in idle:
            grader.close()
        self._threads.shutdown(wait=True, cancel_futures=True)


_pool: GraderPool | None = None
_owner = 0
_lost = 0
_left_behind: list[GraderPool] = []
_pool_lock = threading.Lock()


def _count_lost() -> None:
    global _lost
    with _pool_lock:
        _lost += 1


def take_num_lost() -> int:
    """Answers of this process that got no verdict and count as wrong, since this was last called."""
    global _lost
    with _pool_lock:
        count, _lost = _lost, 0
    return count


def grader_pool() -> GraderPool:
    """The pool of this process, made on first use."""
    global _pool, _owner
    with _pool_lock:
        if _pool is not None and _owner != os.getpid():
            _left_behind.append(_pool)  # forked: its pipes belong to the parent
            _pool = None
        if _pool is None:
            _pool, _owner = GraderPool(), os.getpid()
        return _pool


def close_grader_pool() -> None:
    """End the pool of this process."""
    global _pool
    with _pool_lock:
        pool, _pool = _pool, None
    if pool is not None and _owner == os.getpid():
        pool.close()
