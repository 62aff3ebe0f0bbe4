"""What happens to GPU memory when processes die, and whether others' processes are seen."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from gpu_bench.memory import ENGINE, TRAINER, MemoryWatch, gap_between
from gpu_bench.results import Results
from gpu_bench.training import flags, metrics_of
from main_job_bench.processes import ROOT, environment, python
from miles.tracking.metrics_file import read_metrics
from miles_agents.agent.inventory import DriverNvml, gpu_notices, take_inventory

_RUN_S = 380.0
_HOLDS = 8 << 30


def rank_killed(results: Results, backend: str) -> None:
    """In a colocated run: the trainer's rank is killed while it trains, then the engine's scheduler while it generates.
    The run goes on, and each successor takes memory only after the dead one's is back."""
    out, run_dir = results.out, results.out / "run-killed"
    arguments = flags(
        out, backend, run_dir, "--colocate", "--rollout-num-gpus", "1", "--num-rollout", "6", "--use-fault-tolerance"
    )
    with MemoryWatch() as watch, (out / "rank-killed.run.log").open("wb") as log:
        process = subprocess.Popen(
            python(str(ROOT / "train.py"), *arguments), env=environment(8, {"NO_COLOR": "1"}), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        strikes = []
        try:
            for role, after in ((TRAINER, 2), (ENGINE, 4)):
                wait_for_rows(process, run_dir, after)
                pid = wait_for_holder(process, watch, role)
                at = time.time()
                os.kill(pid, signal.SIGKILL)
                strikes.append((role, pid, at))
            results.add("exit code", process.wait(_RUN_S))
        finally:
            for role, pid, at in strikes:  # also of a run that went wrong
                gone, came = gap_between(watch.samples, watch.roles, pid, at)
                name, note = (
                    f"{role} killed: its memory is back after",
                    f"its successor takes memory after {came:.2f} s",
                )
                results.add(name, gone, "s", note)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60.0)
    metrics_of(results, run_dir)


def wait_for_rows(process: subprocess.Popen[bytes], run_dir: Path, count: int) -> None:
    """Until so many iterations are done. Raises RuntimeError if the run ends before."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + _RUN_S
    while True:
        rows = [row for row in read_metrics(path) if row["event"] == "rollout"] if path.exists() else []
        if len(rows) >= count:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run has ended after {len(rows)} iterations, or is too slow")
        time.sleep(0.05)


def wait_for_holder(process: subprocess.Popen[bytes], watch: MemoryWatch, role: str) -> int:
    """A process of that role that holds more than 2 % of the GPU: it is at work."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and process.poll() is None:
        last = watch.samples[-1]
        for pid in watch.pids(role):
            if last.by_pid[pid] > 0.02 * watch.total and psutil.pid_exists(pid):
                return pid
        time.sleep(0.01)
    raise RuntimeError(f"no {role} holds memory")


def foreign(results: Results) -> None:
    """A process that is none of the run's holds memory: the inventory names it before a run begins."""
    program = (
        f"import torch, sys; a = torch.empty({_HOLDS}, dtype=torch.uint8, device='cuda'); "
        "print('holds', flush=True); sys.stdin.read()"
    )
    command = python("-c", program)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        notices = notices_now()
        results.add("notice", "; ".join(notices) or "none")
        results.add("it names the process", str(any(str(other.pid) in notice for notice in notices)))
        other.stdin.close()
        other.wait(30.0)
    results.add("notice afterwards", "; ".join(notices_now()) or "none")


def notices_now() -> list[str]:
    """What an agent would say of this machine's GPUs."""
    info = take_inventory("node-0", cpu_slots=None, interface=None, nvml=DriverNvml())
    return gpu_notices(DriverNvml(), info)
