"""The controller: meshes, placement, supervision, status. It never runs user code and never imports torch.

from miles_controller import Controller, ControllerConfig, Policy, Request
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_controller.config import ControllerConfig
    from miles_controller.controller import Controller
    from miles_controller.owned_mesh import OwnedMesh
    from miles_controller.placement import Placement, Request
    from miles_controller.policy import Policy

_EXPORTS = {
    "Controller": "controller",
    "ControllerConfig": "config",
    "OwnedMesh": "owned_mesh",
    "Placement": "placement",
    "Policy": "policy",
    "Request": "placement",
}
__all__ = ["Controller", "ControllerConfig", "OwnedMesh", "Placement", "Policy", "Request"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
