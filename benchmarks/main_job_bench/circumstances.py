"""What a figure depends on: the machine, and the versions of what is compared."""

from __future__ import annotations

import importlib.metadata
import os

from runtime_bench.circumstances import machine

__all__ = ["cores", "machine", "use_cores", "versions"]

_LIBRARIES = ("torch", "transformers", "sglang", "sglang-router", "megatron-core", "trl", "accelerate")


def versions() -> dict[str, str]:
    """Of both sides and of what they stand on, as far as installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> list[int]:
    """That this process may use."""
    return sorted(os.sched_getaffinity(0))


def use_cores(count: int) -> int:
    """Confine this process, and all that it starts, to so many cores (fewer if there are fewer). Returns how many."""
    chosen = cores()[:count]
    os.sched_setaffinity(0, chosen)
    return len(chosen)
