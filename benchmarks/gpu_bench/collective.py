"""A rank that is killed with -9 while it is in a collective with the other one: the group goes down and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from gpu_bench import rehearsal
from gpu_bench.hooks import COLLECTIVE_S
from gpu_bench.layouts import trained
from gpu_bench.memory import MemoryWatch, Sample
from gpu_bench.results import Results
from gpu_bench.runs import running
from gpu_bench.strikes import judge, seconds, strike_directory, strike_notes, told_recoveries
from gpu_bench.training import metrics_of

_RUN_S, _START_S, _WITHIN_S = 200.0, 120.0, 2.0


def rank_killed_nccl(results: Results) -> None:
    """Two tensor-parallel ranks train recorded rollouts. While both are in all-reduces of 256 MiB, one is killed."""
    out = results.out
    strikes = strike_directory(out / "strikes-collective")
    each = trained(
        out, "rank-killed-nccl", "layers8", "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2",
        "--use-fault-tolerance", "--custom-megatron-before-train-step-hook-path", "gpu_bench.hooks.wait_in_collective",
        "--env", f"STRIKE_DIR={strikes}", "--num-rollout", "4",
    )  # fmt: skip
    run_dir = out / "run-rank-killed-nccl"
    with MemoryWatch(0) as first, MemoryWatch(1) as second, running(out, each) as process:
        below: list[psutil.Process] = []
        try:
            pids = wait_for_ranks(process, strikes)
            time.sleep(_WITHIN_S)
            below = psutil.Process(process.pid).children(recursive=True)
            at = strike(strikes, pids[1])
            results.add("killed within the collective", f"pid {pids[1]}", note=f"the survivor: {pids[0]}")
            told_end(results, pids, at)
            results.add("exit code", process.wait(_RUN_S))
        finally:
            time.sleep(0.5)
            told_aftermath(results, strike_notes(strikes), (first, second))
            told_recoveries(results, run_dir)
            metrics_of(results, run_dir)
    told_left(results, below, (first, second))
    judge(results, process.returncode, run_dir, expected=1)


def wait_for_ranks(process: subprocess.Popen[bytes], strikes: Path) -> list[int]:
    """The pids of both ranks, once they are in the collective. Raises RuntimeError if the run ends before."""
    deadline = time.monotonic() + _START_S
    while not {"within-0", "within-1"} <= (notes := strike_notes(strikes)).keys():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the ranks did not come to the collective: {sorted(notes)}; see the log of the run")
        time.sleep(0.05)
    return [int(notes[f"within-{rank}"]["pid"]) for rank in (0, 1)]


def strike(strikes: Path, pid: int) -> float:
    """When. The file that says so comes first, so that no rank waits for the next one."""
    os.environ["STRIKE_DIR"] = str(strikes)
    from gpu_bench.hooks import note

    note("struck", pid=pid)
    os.kill(pid, signal.SIGKILL)
    return time.time()


def told_end(results: Results, pids: list[int], at: float) -> None:
    """Seconds until the dead process and the survivor are gone from the process table."""
    left = {pids[1]: "killed rank is gone after", pids[0]: "survivor is gone after"}
    while left and time.time() - at < COLLECTIVE_S:
        for pid in [pid for pid in left if not alive(pid)]:
            results.add(left.pop(pid), time.time() - at, "s")
        time.sleep(0.01)
    for name in left.values():
        results.add(name, f"never within {COLLECTIVE_S:g} s")


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def told_aftermath(results: Results, notes: Mapping[str, Any], watches: Iterable[MemoryWatch]) -> None:
    """Seconds from the strike until each GPU has the dead group's memory back, and until ranks train again."""
    if "struck" not in notes:
        return
    at = float(notes["struck"]["at"])
    ranks = {int(notes[f"within-{rank}"]["pid"]): rank for rank in (0, 1)}
    for index, watch in enumerate(watches):
        if not watch.total:
            results.add(f"GPU {index}: memory is back after", rehearsal.NOT_MEASURED)
            continue
        for pid, gone in freed(watch.samples, ranks, at).items():
            results.add(f"GPU {index}: memory of rank {ranks[pid]} is back after", seconds(gone), "s")
    again = [float(value["at"]) for name, value in notes.items() if name.startswith("again-")]
    lost = [float(value["at"]) for name, value in notes.items() if name.startswith("again-2-")]
    for name, times in (("the group trains again after", again), ("it trains the lost rollout again after", lost)):
        results.add(name, min(times) - at if times else "never", "s" if times else "")


def freed(samples: Iterable[Sample], pids: Iterable[int], at: float) -> dict[int, float]:
    """Seconds after ``at`` until each of these processes that held memory of this GPU held none; inf: never."""
    ordered = list(samples)
    held = {pid for pid in pids if any(pid in sample.by_pid for sample in ordered if sample.at <= at)}
    after = [sample for sample in ordered if sample.at > at]
    return {
        pid: next((sample.at - at for sample in after if pid not in sample.by_pid), float("inf"))
        for pid in sorted(held)
    }


def told_left(results: Results, below: Iterable[psutil.Process], watches: Iterable[MemoryWatch]) -> None:
    """Whether anything of the run is there afterwards."""
    left = [process.pid for process in below if process.is_running() and alive(process.pid)]
    results.add("processes that are left", len(left), note=", ".join(map(str, left)))
    for index, watch in enumerate(watches):
        if watch.samples:
            last = watch.samples[-1]
            results.add(f"GPU {index}: in use afterwards", last.used / 1e9, "GB", f"by {sorted(last.by_pid)}")
