"""Import-only ``torchvision`` for SGLang on a CPU: its builds for CUDA do not load beside a torch for CPUs.

SGLang's image and video processors import it; models of text never call it.
"""

from __future__ import annotations

import importlib
from typing import Any

from absent_library import any_module_below  # type: ignore[import-not-found]  # beside this one

__version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")


any_module_below(__name__)
