"""What this machine is, and whether everything imports."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from typing import Any

from gpu_bench.results import Results
from miles_agents.agent.inventory import DriverNvml, inventory_notices, take_inventory
from runtime_bench.circumstances import machine

_DISTRIBUTIONS = (
    "torch", "triton", "megatron-core", "sglang", "sglang-kernel", "sglang-router", "torch-memory-saver",
    "transformers",
)  # fmt: skip
_MODULES = (
    "miles.backends.megatron_utils.backend",
    "miles.backends.fsdp_utils.backend",
    "sgl_kernel",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.utils",
    "torch_memory_saver",
    "sglang_router",
)


def facts(results: Results) -> None:
    """Machine, versions, imports with their seconds, inventory, and how fast memory is."""
    for name, value in machine().items():
        results.add(name, value)
    for name in _DISTRIBUTIONS:
        results.add(name, importlib.metadata.version(name))
    info = take_inventory("node-0", cpu_slots=None, interface=None, nvml=DriverNvml())
    for gpu in info.gpus:
        results.add(f"GPU {gpu.index}", gpu.name, note=f"{gpu.memory_bytes >> 20} MiB, {gpu.uuid}")
    results.add("notices", "; ".join(inventory_notices(info)) or "none")
    for module in _MODULES:
        began = time.perf_counter()
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  # what is missing is the finding
            results.add(f"import {module}", f"failed: {type(error).__name__}: {error}"[:300])
        else:
            results.add(f"import {module}", time.perf_counter() - began, "s")
    results.add("copy within the GPU", copy_rate() / 1e12, "TB/s", "bytes read and written")


def copy_rate(num_bytes: int = 4 << 30) -> float:
    """Bytes read and written per second by a copy within the GPU."""
    seconds = copy_seconds(num_bytes)
    return 2 * num_bytes / seconds


def copy_seconds(num_bytes: int, repeats: int = 20) -> float:
    """Median seconds of one copy of so many bytes within the GPU."""
    import torch

    cuda: Any = torch.cuda
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(repeats + 3):
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times[3:])[repeats // 2]
