"""Runs of ``train.py`` that go on at the same time, each with its log and its GPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from gpu_bench.rehearsal import is_rehearsal
from main_job_bench.processes import ROOT, RunFailed, environment, python
from miles_agents.worker.main import STACK_SIGNAL

_GRACE_S, _STACKS_S = 60.0, 0.5


@dataclass(frozen=True)
class Run:
    """``gpus``: positions among the GPUs that this process sees, such as ``(1,)``; empty: all of them."""

    name: str
    arguments: Sequence[str]
    gpus: tuple[int, ...] = ()

    def log(self, out: Path) -> Path:
        """What it says."""
        return out / f"{self.name}.run.log"


def visible(gpus: Sequence[int], inherited: str | None) -> str:
    """``CUDA_VISIBLE_DEVICES`` for these of the GPUs that are visible here."""
    names = inherited.split(",") if inherited else []
    return ",".join(names[gpu] if gpu < len(names) else str(gpu) for gpu in gpus)


@contextlib.contextmanager
def running(out: Path, each: Run) -> Iterator[subprocess.Popen[bytes]]:
    """A run that is under way; when left it is gone, asked first and then killed."""
    more = {"NO_COLOR": "1", "COLUMNS": "160"}
    if each.gpus and not is_rehearsal():
        more["CUDA_VISIBLE_DEVICES"] = visible(each.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    command = python(str(ROOT / "train.py"), *each.arguments)
    with under_way(command, environment(threads(), more), each.log(out)) as process:
        yield process


@contextlib.contextmanager
def under_way(command: Sequence[str], env: Mapping[str, str], log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program beside others; when left it and all below it are gone, asked first and then killed."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            _end(process)


def threads() -> int:
    """For each process."""
    return 1 if is_rehearsal() else 8


def _end(process: subprocess.Popen[bytes]) -> None:
    below = psutil.Process(process.pid).children(recursive=True)
    _print_stacks(below)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for other in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()


def _print_stacks(below: Sequence[psutil.Process]) -> None:
    """Of workers that are not done in time, into their logs: where they are."""
    asked = False
    for other in below:
        with contextlib.suppress(psutil.Error):
            is_rank = any("gpu_bench.trainer_ranks" in word for word in other.cmdline()[:4])
            if is_rank or other.name().startswith(("trainer", "rollout")):
                other.send_signal(STACK_SIGNAL)
                asked = True
    if asked:
        time.sleep(_STACKS_S)


def together(out: Path, runs: Sequence[Run], deadline_s: float) -> None:
    """Run all of them at the same time, to their ends. Raises RunFailed, with the names of those that did not end well,
    when all have ended."""
    deadline, why = time.monotonic() + deadline_s, []
    with contextlib.ExitStack() as stack:
        processes = [(each, stack.enter_context(running(out, each))) for each in runs]
        for each, process in processes:
            try:
                code = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                why.append(f"{each.name}: not done within {deadline_s:g} s")
                continue
            if code:
                why.append(f"{each.name}: exit code {code}: {last_words(each.log(out))}")
    if why:
        raise RunFailed("; ".join(why))


def last_words(log: Path) -> str:
    """Three lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:500]
