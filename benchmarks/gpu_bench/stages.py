"""The stages, in the order in which they run. Each imports what it needs when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_bench.results import Results


@dataclass(frozen=True)
class Stage:
    """``function`` of ``module`` takes ``Results`` and ``arguments``."""

    module: str
    function: str
    deadline_s: float
    gpus: int = 1
    arguments: tuple[str, ...] = ()

    def run(self, results: Results) -> None:
        """Here, until it is done or raises."""
        getattr(importlib.import_module(f"gpu_bench.{self.module}"), self.function)(results, *self.arguments)


STAGES = {
    "facts": Stage("facts", "facts", 120),
    "ipc": Stage("ipc", "ipc", 400),
    "ipc-large": Stage("ipc", "ipc_large", 400),
    "grpo-megatron": Stage("training", "colocated", 500, arguments=("megatron",)),
    "grpo-fsdp": Stage("training", "colocated", 400, arguments=("fsdp",)),
    "fresh-engine": Stage("ipc", "fresh_engine", 200),
    "rank-killed": Stage("strikes", "rank_killed", 400, arguments=("megatron",)),
    "zygote": Stage("zygote", "zygote", 120),
    "foreign": Stage("strikes", "foreign", 120),
    "nccl": Stage("nccl", "nccl", 500, gpus=2),
    "broadcast": Stage("training", "disaggregated", 500, gpus=2, arguments=("1", "1")),
    "broadcast-tp2": Stage("training", "disaggregated", 500, gpus=4, arguments=("2", "2")),
    "layouts": Stage("training", "layouts", 600, gpus=2),
}


def chosen(names: Sequence[str], gpus: int) -> list[str]:
    """These, or all, without those that need more GPUs. Raises ValueError for a name that there is not."""
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return [name for name in STAGES if (name in names or not names) and STAGES[name].gpus <= gpus]
