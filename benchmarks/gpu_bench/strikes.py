"""What happens to GPU memory when processes die, and whether others' processes are seen."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from gpu_bench import rehearsal
from gpu_bench.compare import rollout_rows
from gpu_bench.memory import ENGINE, TRAINER, MemoryWatch, gap_between
from gpu_bench.results import Results
from gpu_bench.runs import Run, running
from gpu_bench.training import flags, metrics_of
from main_job_bench.processes import python
from miles_agents.agent.inventory import DriverNvml, gpu_notices, take_inventory

_RUN_S = 260.0
_HOLDS = 8 << 30
_ROLLOUTS = 4


def killed_memory(results: Results) -> None:
    """In a colocated run the trainer's rank is killed before a step of the second rollout, and the engine's scheduler
    while it generates the fourth. The run goes on to its end, and each successor takes memory only after the dead one's
    is back. Raises RuntimeError if it does not."""
    out, run_dir = results.out, results.out / "run-killed"
    strikes = strike_directory(out / "strikes-killed")
    arguments = flags(
        out, "megatron", run_dir, "--colocate", "--rollout-num-gpus", "1", "--num-rollout", str(_ROLLOUTS),
        "--rollout-max-response-len", str(min(128, rehearsal.sizes()[2])), "--use-fault-tolerance",
        "--custom-rm-path", "gpu_bench.hooks.low_tokens_and_strike",
        "--custom-megatron-before-train-step-hook-path", "gpu_bench.hooks.strike_self",
        "--sglang-server-concurrency", str(_concurrency()), "--env", f"STRIKE_DIR={strikes}",
        "--env", f"STRIKE_ANSWER={strike_answer()}", shape="layers8",
    )  # fmt: skip
    each = Run("killed-memory", arguments)
    with MemoryWatch() as watch, running(out, each) as process:
        try:
            results.add("exit code", process.wait(_RUN_S))
        except subprocess.TimeoutExpired:
            results.add("exit code", f"none within {_RUN_S:g} s")
        finally:
            time.sleep(0.5)
            told_strikes(results, strikes, watch)
            told_recoveries(results, run_dir)
            metrics_of(results, run_dir)
    judge(results, process.returncode, run_dir, expected=2)


def _concurrency() -> int:
    """So few requests at a time that others generate and wait when the first answers are graded."""
    prompts, answers, _ = rehearsal.sizes()
    return prompts * answers // 4


def strike_answer() -> int:
    """In the second wave of the fourth rollout's requests."""
    prompts, answers, _ = rehearsal.sizes()
    return (_ROLLOUTS - 1) * prompts * answers + _concurrency() + 2


def strike_directory(path: Path) -> Path:
    """Empty."""
    path.mkdir(exist_ok=True)
    for old in path.glob("*.json"):
        old.unlink()
    return path


def strike_notes(directory: Path) -> dict[str, dict[str, Any]]:
    """What the hooks left, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def told_strikes(results: Results, directory: Path, watch: MemoryWatch) -> None:
    """Seconds of each strike's aftermath."""
    notes = strike_notes(directory)
    for role in (TRAINER, ENGINE):
        if role not in notes:
            results.add(f"{role} killed", "never")
        elif not watch.total:
            results.add(f"{role} killed: its memory is back after", rehearsal.NOT_MEASURED)
        else:
            gone, came = gap_between(watch.samples, watch.roles, int(notes[role]["pid"]), float(notes[role]["at"]))
            results.add(f"{role} killed: its memory is back after", seconds(gone), "s")
            results.add(f"{role} killed: its successor takes memory after", seconds(came), "s")


def seconds(value: float) -> float | str:
    """What never came in words."""
    return "never" if value == float("inf") else value


def recoveries(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run that tell of one."""
    path = run_dir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in events if event["kind"] == "recovered"]


def told_recoveries(results: Results, run_dir: Path) -> None:
    """A row for each."""
    for number, event in enumerate(recoveries(run_dir), start=1):
        results.add(f"recovery {number}", float(event["fields"]["seconds"]), "s", str(event["text"])[:300])


def judge(results: Results, code: int | None, run_dir: Path, *, expected: int) -> None:
    """Raises RuntimeError unless the run ended well, with all rollouts and so many recoveries."""
    found, rows = len(recoveries(run_dir)), len(rollout_rows(run_dir))
    results.add("recoveries and rollouts", f"{found}, {rows}", note=f"expected {expected}, {_ROLLOUTS}")
    if code != 0 or found != expected or rows != _ROLLOUTS:
        raise RuntimeError(f"exit code {code}, {found} recoveries, {rows} rollouts; see the log of the run")


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
