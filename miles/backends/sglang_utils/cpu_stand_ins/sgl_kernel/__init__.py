"""Import-only ``sgl_kernel`` for SGLang on a CPU: there is no CPU build of it on the package index.

SGLang looks for the AMX operators that the real one registers, finds none, and takes its own pure-torch paths. Every
name exists, and raises when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is a stand-in: there is no sgl_kernel for this CPU")

    return missing
