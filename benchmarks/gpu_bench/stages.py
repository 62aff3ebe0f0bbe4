"""The stages, in the order in which they run. Each imports what it needs when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_bench.placing import SEPARATE_GPUS, SHARED_GPUS, VARIABLE
from gpu_bench.results import Results


@dataclass(frozen=True)
class Stage:
    """``function`` of ``module`` takes ``Results`` and ``arguments``; if it can share GPUs, how many there are, too."""

    module: str
    function: str
    deadline_s: float
    gpus: int = 1
    arguments: tuple[str, ...] = ()
    beside_s: float = 0.0
    """About how many seconds it takes, if it may run while another one does on another GPU: it measures no speed."""
    shared_gpus: int = 0
    """Enough where ranks of one communicator may share GPUs; 0: they cannot in this stage."""

    def run(self, results: Results, gpus: int) -> None:
        """Here, on the first ``gpus``, until it is done or raises."""
        function = getattr(importlib.import_module(f"gpu_bench.{self.module}"), self.function)
        function(results, *self.all_arguments(gpus))

    def all_arguments(self, gpus: int) -> tuple[object, ...]:
        """Those after ``Results``."""
        return (*self.arguments, gpus) if self.shared_gpus else self.arguments

    def least_gpus(self, *, may_share: bool) -> int:
        """How many it needs."""
        return self.shared_gpus if may_share and self.shared_gpus else self.gpus


STAGES = {
    "facts": Stage("facts", "facts", 120),
    "ipc": Stage("ipc", "ipc", 240),
    "ipc-large": Stage("ipc", "ipc_large", 200),
    "grpo-megatron": Stage("training", "colocated", 500, arguments=("megatron",)),
    "grpo-fsdp": Stage("training", "colocated", 400, arguments=("fsdp",)),
    "fresh-engine": Stage("ipc", "fresh_engine", 200),
    "zygote": Stage("zygote", "zygote", 120),
    "foreign": Stage("strikes", "foreign", 120),
    "killed-memory": Stage("strikes", "killed_memory", 290, beside_s=200),
    "moe": Stage("modes", "moe", 240, beside_s=110),
    "disk": Stage("modes", "disk", 240, beside_s=90),
    "resume": Stage("layouts", "resume", 300, beside_s=100),
    "cpu-offload": Stage("layouts", "cpu_offload", 240, beside_s=60),
    "nccl": Stage("nccl", "nccl", 330, gpus=2),
    "broadcast": Stage("two_gpus", "disaggregated", 300, gpus=2, arguments=("megatron", "1", "1")),
    "broadcast-fsdp": Stage("two_gpus", "disaggregated", 300, gpus=2, arguments=("fsdp", "1", "1")),
    "colocate-tp2": Stage("two_gpus", "colocated_two", 400, gpus=2, arguments=("megatron", "tp")),
    "colocate-fsdp2": Stage("two_gpus", "colocated_two", 300, gpus=2, arguments=("fsdp", "dp")),
    "layouts": Stage("layouts", "layouts", 550, gpus=2),
    "rank-killed-nccl": Stage("collective", "rank_killed_nccl", 300, gpus=2),
    "nccl-tp2": Stage("tensor_parallel", "nccl_tp2", 540, gpus=SEPARATE_GPUS, shared_gpus=SHARED_GPUS),
    "broadcast-tp2": Stage("two_gpus", "disaggregated", 300, gpus=4, arguments=("megatron", "2", "2")),
}
ONLY_ON_GPUS = frozenset(("facts", "ipc", "ipc-large", "fresh-engine", "zygote", "foreign"))
"""A rehearsal leaves them out."""
REHEARSAL_S = 600.0
"""Deadline of each stage in a rehearsal."""


def chosen(names: Sequence[str], gpus: int, *, may_share: bool = False) -> list[str]:
    """These, or all, without those that need more GPUs. Raises ValueError for a name that there is not."""
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    wanted = (name for name in STAGES if name in names or not names)
    return [name for name in wanted if STAGES[name].least_gpus(may_share=may_share) <= gpus]


def left_out(names: Sequence[str], gpus: int, *, rehearsal: bool = False, may_share: bool = False) -> dict[str, str]:
    """Of the stages that were asked for, those that cannot run, and why."""
    found = {}
    for name, stage in STAGES.items():
        if names and name not in names:
            continue
        if stage.least_gpus(may_share=may_share) > gpus:
            less = f", or {stage.shared_gpus} with {VARIABLE}=1" if stage.shared_gpus and not may_share else ""
            found[name] = f"needs {stage.gpus} GPUs{less}, there are {gpus}"
        elif rehearsal and name in ONLY_ON_GPUS:
            found[name] = "needs a GPU"
    return found


def lanes(names: Sequence[str], gpus: int) -> list[list[str]]:
    """Stages that run beside each other, for each GPU those that run there one after the other: the longest first, each
    where least is to do. Empty if there is nothing to gain."""
    beside = sorted((name for name in names if STAGES[name].beside_s), key=lambda name: -STAGES[name].beside_s)
    if gpus < 2 or len(beside) < 2:
        return []
    found: list[list[str]] = [[] for _ in range(gpus)]
    for name in beside:
        min(found, key=lambda lane: sum(STAGES[each].beside_s for each in lane)).append(name)
    return [lane for lane in found if lane]
