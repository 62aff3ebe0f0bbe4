"""``log``: for user code that records metrics of its own, such as custom log functions. Imports no tracker."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

from miles.utils.metric_utils import numbers_of

_lock = Lock()
_logged: dict[str, Any] = {}
_MAX_NAMES = 10_000


def log(args: Any, metrics: Mapping[str, Any], step_key: str = "rollout/step") -> None:
    """Record these with the rollout or evaluation that is under way in this process, which is the rollout manager's:
    in metrics.jsonl, and with every tracker.

    Args:
        args: The run's, for code that is written for the reference system.
        metrics: Numbers by name; what is none is left out.
        step_key: The axis. Its value among the metrics is left out: the run knows where it is.
    """
    with _lock:
        for name, value in metrics.items():
            if name != step_key and (name in _logged or len(_logged) < _MAX_NAMES):
                _logged[name] = value


def take_logged() -> dict[str, float]:
    """What was logged since the last time."""
    with _lock:
        found = numbers_of(_logged)
        _logged.clear()
    return found
