"""What a figure depends on: the machine, and the versions of what is compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil

from runtime_bench.rows import DISTRIBUTIONS

_LIBRARIES = ("torch", "numpy", "pyzmq", "uvloop", "msgpack")


def machine() -> dict[str, str]:
    """Neither names nor addresses: what it is, not which."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cores": str(os.cpu_count()),
        "CPU": model,
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the peers and of what they and we stand on, as far as installed."""
    names = [*(name for name in DISTRIBUTIONS.values() if name not in ("miles", "pyzmq")), *_LIBRARIES]
    return {name: version for name in names if (version := _version(name))}


def why_missing(system: str) -> str:
    """Why a system cannot be measured here; nothing if it can."""
    if system == "ours" or _version(DISTRIBUTIONS[system]):
        return ""
    return "not installed"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
