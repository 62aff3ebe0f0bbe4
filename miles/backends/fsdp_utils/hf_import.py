"""The model classes of transformers, importable with any build of torchvision."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def transformers() -> Any:
    """The package; its model classes can be imported from then on."""
    _make_torchvision_importable()
    return importlib.import_module("transformers")


def _make_torchvision_importable() -> None:
    """Transformers imports torchvision wherever it is installed, and a torchvision built for CUDA does not load its
    operators on a CPU torch: its import fails for want of two schemas, which are all that is needed here."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        importlib.import_module("miles.backends.sglang_utils.cpu_stand_ins.torchvision_operators")
        importlib.import_module("torchvision")
