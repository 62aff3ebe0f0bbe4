"""The model classes of transformers, importable with any build of torchvision."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def transformers() -> Any:
    """The package; its model classes can be imported from then on."""
    _make_torchvision_importable()
    return importlib.import_module("transformers")


def _make_torchvision_importable() -> None:
    """Transformers imports torchvision wherever it is installed, and a torchvision built for CUDA does not load its
    operators on a CPU torch: its import fails for want of two schemas, which are all that is needed here."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _OPERATORS:
            if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                _library.define(schema)  # type: ignore[no-untyped-call]
