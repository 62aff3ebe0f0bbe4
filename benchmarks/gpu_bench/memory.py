"""Who holds GPU memory in which part of an iteration: a thread that asks NVML, and what its samples mean (pure)."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu_bench.rehearsal import is_rehearsal

EVERY_S = 0.02
ENGINE, TRAINER = "engine", "trainer"
_LOOP = (1, 1)
"""Process and thread of the controller's loop in a trace."""


@dataclass(frozen=True)
class Sample:
    """At ``at`` (seconds since the epoch) so many bytes of the GPU were in use, of which by process."""

    at: float
    used: int
    by_pid: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """What the loop did from when to when; ``rollout_id`` -1: before the first iteration."""

    name: str
    begin: float
    end: float
    rollout_id: int


class MemoryWatch:
    """A context manager: samples one GPU until it is left. ``roles``: whose a process is, by pid. ``index``: its
    position among the GPUs that this process sees."""

    def __init__(self, index: int = 0) -> None:
        self.samples: list[Sample] = []
        self.roles: dict[int, str] = {}
        self.total = 0
        self._index = index
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def pids(self, role: str) -> list[int]:
        """Those that hold memory now."""
        by_pid = self.samples[-1].by_pid if self.samples else {}
        return [pid for pid in by_pid if self.roles.get(pid) == role]

    def _run(self) -> None:
        if is_rehearsal():
            return
        import pynvml

        pynvml.nvmlInit()
        handle = _handle(pynvml, self._index, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        while not self._over.wait(EVERY_S):
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            by_pid = {process.pid: int(process.usedGpuMemory or 0) for process in processes}
            for pid in by_pid.keys() - self.roles.keys():
                self.roles[pid] = role_of(pid)
            self.samples.append(Sample(time.time(), int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), by_pid))


def _handle(pynvml: Any, index: int, visible: str | None) -> Any:
    names = visible.split(",") if visible else []
    name = names[index] if index < len(names) else str(index)
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def num_gpus() -> int:
    """How many GPUs this process sees; 0 without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else len([name for name in visible.split(",") if name])


def role_of(pid: int) -> str:
    """By its command line, or its parent's: SGLang renames its children."""
    import psutil

    try:
        process = psutil.Process(pid)
        lines = [" ".join(each.cmdline()) for each in (process, *process.parents()[:2])]
    except psutil.Error:
        return "gone"
    return ENGINE if any("sglang" in line for line in lines) else TRAINER


def read_spans(trace: Path) -> list[Span]:
    """The loop's, of a run's ``trace.json``."""
    events: list[dict[str, Any]] = json.loads(trace.read_text())
    return [
        Span(
            str(event["name"]), event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6,
            int(event.get("args", {}).get("rollout_id", -1)),
        )
        for event in events
        if event.get("ph") == "X" and (event["pid"], event["tid"]) == _LOOP
    ]  # fmt: skip


def held(samples: Iterable[Sample], roles: Mapping[int, str], role: str, span: Span) -> list[int]:
    """Bytes of all processes of that role, by sample within the span; of ``total``, of everybody."""
    within = [sample for sample in samples if span.begin <= sample.at <= span.end]
    if role == "total":
        return [sample.used for sample in within]
    return [sum(used for pid, used in sample.by_pid.items() if roles.get(pid) == role) for sample in within]


def by_iteration(
    samples: Sequence[Sample], roles: Mapping[int, str], spans: Sequence[Span], phase: str, role: str
) -> dict[int, int]:
    """The median of what a role holds while a phase goes on, by rollout."""
    found: dict[int, int] = {}
    for span in spans:
        if span.name == phase and span.rollout_id >= 0:
            values = held(samples, roles, role, span)
            if values:
                found[span.rollout_id] = int(statistics.median(values))
    return found


def released(samples: Sequence[Sample], spans: Sequence[Span]) -> dict[int, int]:
    """The least that is in use between generating and training, by rollout: engines have let go, the trainer sleeps."""
    ends = {span.rollout_id: span.end for span in spans if span.name == "rollout"}
    begins = {span.rollout_id: span.begin for span in spans if span.name == "train"}
    found = {}
    for rollout_id in ends.keys() & begins.keys():
        span = Span("released", ends[rollout_id], begins[rollout_id], rollout_id)
        if values := held(samples, {}, "total", span):
            found[rollout_id] = min(values)
    return dict(sorted(found.items()))


def creep(values: Mapping[int, int], *, warm: int = 1) -> int:
    """How much more the last iteration has than the one after the first ``warm``; 0 where there are too few."""
    later = [values[key] for key in sorted(values)][warm:]
    return later[-1] - later[0] if len(later) > 1 else 0


def gap_between(samples: Sequence[Sample], roles: Mapping[int, str], killed: int, at: float) -> tuple[float, float]:
    """Seconds after ``at`` until a killed process held nothing, and until a successor of its role held something."""
    role = roles.get(killed)
    after = [sample for sample in samples if sample.at >= at]
    gone = next((sample.at for sample in after if killed not in sample.by_pid), float("inf"))
    came = (
        sample.at
        for sample in after
        if any(pid != killed and roles.get(pid) == role for pid in sample.by_pid.keys() - _before(samples, at))
    )
    return gone - at, next(came, float("inf")) - at


def _before(samples: Sequence[Sample], at: float) -> set[int]:
    earlier = [sample for sample in samples if sample.at < at]
    return set(earlier[-1].by_pid) if earlier else set()
