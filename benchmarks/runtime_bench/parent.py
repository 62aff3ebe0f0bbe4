"""Runs the children, one at a time, and sees to it that nothing of them is left.

Consumes the cases and systems that are wanted. Produces ``Results``. Waits for a child's figures, and then for its
end, each with a deadline. Invariant: when ``measure`` is left, by whatever way, no process below this one is left:
orphans of a child come to this process (it is their subreaper) and are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from runtime_bench.figures import Results, Sample
from runtime_bench.rows import Case

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 20.0
_LEAVE_S = 10.0
_TAIL_LINES = 15
_BENCHMARKS = Path(__file__).parents[1]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One child: a system, a case, a round."""

    case: Case
    system: str
    round: int

    def __str__(self) -> str:
        return f"{self.case.name}, {self.system}, round {self.round + 1}"


def plan(cases: Sequence[Case], systems: Sequence[str], num_rounds: int) -> list[Run]:
    """In which order: case by case, round by round, the systems in turn and each round begun by another one. Pure."""
    runs = []
    for case in cases:
        taking_part = [system for system in systems if system in case.systems]
        for number in range(num_rounds):
            first = number % max(1, len(taking_part))
            runs += [Run(case, system, number) for system in taking_part[first:] + taking_part[:first]]
    return runs


def adopt_orphans() -> None:
    """Make this process the one that orphans of its children come to. Raises OSError."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def measure(run: Run, results: Results, *, effort: str) -> str:
    """Run one child; figures, notes and failures go to ``results``. Returns what it said if it failed, or nothing."""
    with tempfile.TemporaryDirectory(prefix="mb-", ignore_cleanup_errors=True) as directory:
        why_failed = _run(run, results, effort, Path(directory))
    if why_failed:
        results.failures.append(f"{run}: {why_failed.splitlines()[-1]}")
    return why_failed


def _run(run: Run, results: Results, effort: str, directory: Path) -> str:
    """Returns why it failed, or nothing."""
    read, write = os.pipe()
    log_path = directory / "log"
    with os.fdopen(read, "rb", buffering=0) as pipe, log_path.open("wb") as log:
        try:
            process = _start(run, write, effort, directory, log)
        finally:
            os.close(write)
        with _ended(process):
            verdict = _collect(pipe, run, results)
            if not verdict:
                verdict = _wait(process)
    return f"{_tail(log_path)}\n{verdict}" if verdict else ""


def _start(run: Run, fd: int, effort: str, directory: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(_BENCHMARKS), os.environ.get("PYTHONPATH")]))
    place = {"PYTHONPATH": path, "TMPDIR": str(directory), "RAY_TMPDIR": str(directory)}
    return subprocess.Popen(
        [sys.executable, "-m", "runtime_bench.child", run.system, run.case.name, str(fd), effort],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, **_ENVIRONMENT, **place},
        pass_fds=(fd,),
        start_new_session=True,  # Ctrl-C comes to us alone; what it means for children is decided here
    )


def _collect(pipe: IO[bytes], run: Run, results: Results) -> str:
    """Read figures until the child says that it is done. Returns what went wrong, or nothing."""
    deadline = time.monotonic() + run.case.deadline_s
    unread = b""
    while True:
        readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return f"not done within {run.case.deadline_s:g} s"
        block = os.read(pipe.fileno(), 65536)
        if not block:
            return "it ended before it was done"
        *lines, unread = (unread + block).split(b"\n")
        for line in lines:
            content = json.loads(line)
            if "done" in content:
                return ""
            if "sample" in content:
                results.samples.append(Sample.from_json(content["sample"]))
            elif content["note"] not in results.notes:
                results.notes.append(content["note"])


def _wait(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return f"its figures came, but it had not ended {_GRACE_S:g} s later"
    return f"its figures came, but it ended with exit code {code}" if code else ""


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """When left, the child and all below it are gone: asked first, killed if that takes too long."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()  # unwinds its contexts
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        psutil.wait_procs(_below(), timeout=_LEAVE_S)  # an agent whose starter is gone ends by itself, in order
        while left := _below():
            for other in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    other.kill()
            psutil.wait_procs(left, timeout=1.0)
        process.wait()
        _reap()


def _below() -> list[psutil.Process]:
    """All that runs below this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def _reap() -> None:
    """Orphans that came here and have ended: whoever comes after us may not do it."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])
