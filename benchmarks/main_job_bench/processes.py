"""Runs a program to its end, with a deadline; nothing of it is left afterwards.

Consumes a command line. Produces its exit and the end of what it said. Invariant: when ``run`` is left, by whatever
way, no process below this one is left: orphans come to this process (``adopt_orphans``) and are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

BENCHMARKS = Path(__file__).parents[1]
ROOT = BENCHMARKS.parent
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 30.0
_TAIL_LINES = 20


class RunFailed(Exception):
    """A program did not end well. The last line of its text says why; before it comes the end of what it said."""


def adopt_orphans() -> None:
    """Make this process the one that orphans of its children come to. Raises OSError."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def python(*arguments: str) -> list[str]:
    """A command line of this interpreter."""
    return [sys.executable, *arguments]


def environment(num_threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a program that may use so many threads for computing."""
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **(more or {}),
    }


def run(command: Sequence[str], *, env: Mapping[str, str], log_path: Path, deadline_s: float) -> float:
    """Run it; what it says goes to ``log_path``. Returns its start on the clock of ``time.time``. Raises RunFailed."""
    with log_path.open("wb") as log:
        began = time.time()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C comes to us alone; what it means for others is decided here
        )
        with _ended(process):
            try:
                code = process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"{_tail(log_path)}\nnot done within {deadline_s:g} s") from None
    if code:
        raise RunFailed(f"{_tail(log_path)}\nit ended with exit code {code}")
    return began


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """When left, the process and all below it are gone: asked first, killed if that takes too long."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # unwinds its contexts
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        while left := _below():
            for other in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    other.kill()
            psutil.wait_procs(left, timeout=1.0)
        process.wait()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _below() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
