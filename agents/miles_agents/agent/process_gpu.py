"""Who still holds GPU memory. A killed process is gone before its driver has given the memory back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol


class GpuMemoryProbe(Protocol):
    """Answers fast and without blocking for long: it is called on the agent's loop."""

    def used_bytes(self, pids: Collection[int]) -> dict[int, int]:
        """Bytes of GPU memory by pid, over all GPUs, of those of ``pids`` that hold any.

        A process whose amount the driver does not tell counts with 0 bytes, but it is listed.
        """


class NvmlProbe:
    """Asks NVML. In a container with its own pid namespace NVML knows other pid numbers, and this finds nothing."""

    def __init__(self, nvml: Any = None) -> None:
        if nvml is None:
            import pynvml

            nvml = pynvml
        self._nvml = nvml
        self._nvml.nvmlInit()

    def used_bytes(self, pids: Collection[int]) -> dict[int, int]:
        """See ``GpuMemoryProbe``. Compute contexts only; a GPU that does not answer is left out."""
        used: dict[int, int] = {}
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(device)
            except self._nvml.NVMLError:
                continue
            for process in processes:
                if process.pid in pids:
                    used[process.pid] = used.get(process.pid, 0) + (process.usedGpuMemory or 0)
        return used
