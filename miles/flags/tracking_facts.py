"""What the machine says about trackers: packages, keys, ports, and variables that stand for flags."""

from __future__ import annotations

import netrc
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from miles.tracking.trackers import chosen, missing_packages

VARIABLES = ("WANDB_MODE", "MLFLOW_TRACKING_URI", "PROMETHEUS_PORT")
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_WANDB = "https://api.wandb.ai"


@dataclass(frozen=True)
class TrackingFacts:
    """For the trackers that the flags turn on.

    Attributes:
        missing: Packages that are not installed, by tracker.
        has_wandb_key: A key of the server is known: by a variable, or from ``wandb login``.
        variables: Of ``VARIABLES``, those that are set.
        port_error: Why Prometheus' port cannot be listened on.
    """

    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_wandb_key: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)
    port_error: str = ""


def look_at_tracking(values: Mapping[str, Any]) -> TrackingFacts:
    """Look. ``values`` are the flags, defaults included; ``--env`` as it was typed."""
    typed = dict(entry.split("=", 1) for entry in values.get("env") or [] if "=" in entry)
    environment = {**os.environ, **typed}
    names = [*chosen(values), *(["tensorboard"] if values.get("tensorboard_dir") else [])]
    variables = {name: environment[name] for name in VARIABLES if environment.get(name)}
    return TrackingFacts(
        missing={name: missing for name in names if (missing := tuple(missing_packages(name, values, variables)))},
        has_wandb_key=bool(values.get("wandb_key")) or _has_wandb_key(values, environment),
        variables=variables,
        port_error=_port_error(values, variables) if values.get("use_prometheus") else "",
    )


def _has_wandb_key(values: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    if any(environment.get(name) for name in _KEYS):
        return True
    host = urlsplit(values.get("wandb_host") or environment.get("WANDB_BASE_URL") or _WANDB).hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return False


def _port_error(values: Mapping[str, Any], variables: Mapping[str, str]) -> str:
    """Listens for a moment. A port that is not a number is a rule's business."""
    port = str(values.get("prometheus_port"))
    if port == "9090" and "PROMETHEUS_PORT" in variables:
        port = variables["PROMETHEUS_PORT"]
    address = str(values.get("prometheus_address"))
    if not port.isdigit() or int(port) > 65535:
        return ""
    try:
        found = socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(found[4])
    except OSError as error:
        return f"{address} port {port}: {error}"
    return ""
