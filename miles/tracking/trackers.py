"""Which trackers there are, what they need, and how they are made. Imports none of their libraries."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.tracking.tracker import Tracker


@dataclass(frozen=True)
class Kind:
    """A tracker.

    Attributes:
        flag: That turns it on.
        module: With its class.
        cls: The class.
        packages: Modules that it imports, by the package that has them.
        extra: Of ``pip install 'miles[...]'``.
        settings: Keys of the config that it reads.
    """

    flag: str
    module: str
    cls: str
    packages: Mapping[str, str]
    extra: str
    settings: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "tensorboard": Kind(
        "--use-tensorboard",
        "miles.tracking.tensorboard_tracker",
        "TensorBoardTracker",
        {"tensorboard": "tensorboard"},
        "tensorboard",
        ("tensorboard_dir", "tb_project_name", "tb_experiment_name"),
    ),
    "wandb": Kind(
        "--use-wandb",
        "miles.tracking.wandb_tracker",
        "WandbTracker",
        {"wandb": "wandb"},
        "wandb",
        (
            *("wandb_project", "wandb_group", "wandb_mode", "wandb_dir", "wandb_host", "wandb_team", "wandb_run_id"),
            *("wandb_run_name", "wandb_random_suffix"),
        ),
    ),
    "mlflow": Kind(
        "--use-mlflow",
        "miles.tracking.mlflow_tracker",
        "MlflowTracker",
        {"mlflow": "mlflow-skinny"},
        "mlflow",
        ("mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "mlflow_run_id"),
    ),
    "prometheus": Kind(
        "--use-prometheus",
        "miles.tracking.prometheus_tracker",
        "PrometheusTracker",
        {"prometheus_client": "prometheus-client"},
        "prometheus",
        ("prometheus_port", "prometheus_address", "prometheus_run_name"),
    ),
}
"""By the name that processes and files use."""
DATABASE_PACKAGES: Mapping[str, str] = {"sqlalchemy": "sqlalchemy", "alembic": "alembic"}
"""What MLflow imports besides for a database."""


def chosen(config: Mapping[str, Any]) -> list[str]:
    """The trackers that the flags turn on."""
    return [name for name in KINDS if config.get(f"use_{name}")]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the chosen trackers read."""
    return {key: config.get(key) for name in chosen(config) for key in KINDS[name].settings}


def missing_packages(name: str, config: Mapping[str, Any], variables: Mapping[str, str]) -> list[str]:
    """What a tracker would import and is not installed; found without importing it."""
    needed = dict(KINDS[name].packages)
    uri = config.get("mlflow_tracking_uri") or variables.get("MLFLOW_TRACKING_URI") or "sqlite:"
    if name == "mlflow" and not str(uri).startswith(("http://", "https://", "databricks")):
        needed |= DATABASE_PACKAGES
    return [package for module, package in needed.items() if not is_installed(module)]


def is_installed(module: str) -> bool:
    """Whether a package can be imported. A directory that happens to have its name (``wandb`` makes one) is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def make(name: str) -> Tracker:
    """The tracker of this name."""
    kind = KINDS[name]
    tracker: Tracker = getattr(importlib.import_module(kind.module), kind.cls)()
    return tracker
