"""Who still holds GPU memory. A killed process is gone before its driver has given the memory back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, Protocol

logger = logging.getLogger(__name__)


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
        self.num_faults = 0
        self._nvml = nvml
        self._nvml.nvmlInit()

    def used_bytes(self, pids: Collection[int]) -> dict[int, int]:
        """See ``GpuMemoryProbe``. Compute contexts only; a GPU that does not answer is left out, counted, told once."""
        used: dict[int, int] = {}
        for index in range(self._ask(self._nvml.nvmlDeviceGetCount, default=0)):
            processes = self._ask(self._processes_on, index, default=())
            for process in processes:
                if process.pid in pids:
                    used[process.pid] = used.get(process.pid, 0) + (process.usedGpuMemory or 0)
        return used

    def _processes_on(self, index: int) -> Any:
        return self._nvml.nvmlDeviceGetComputeRunningProcesses(self._nvml.nvmlDeviceGetHandleByIndex(index))

    def _ask(self, question: Callable[..., Any], *args: Any, default: Any) -> Any:
        try:
            return question(*args)
        except self._nvml.NVMLError as error:
            self.num_faults += 1
            if self.num_faults == 1:
                logger.warning("NVML does not answer, so nobody waits for GPU memory that it does not tell: %s", error)
            return default
