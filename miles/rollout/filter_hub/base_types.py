"""What filters return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DynamicFilterOutput:
    """Whether a prompt group is kept; if not, why, in a few characters: it becomes part of a metric's name."""

    keep: bool
    reason: str | None = None


def call_dynamic_filter(fn: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> DynamicFilterOutput:
    """Ask a filter; without one, everything is kept."""
    return DynamicFilterOutput(keep=True) if fn is None else as_filter_output(fn(*args, **kwargs))


def as_filter_output(result: Any) -> DynamicFilterOutput:
    """A filter's answer in its full form: a bare truth value is wrapped."""
    return result if isinstance(result, DynamicFilterOutput) else DynamicFilterOutput(keep=bool(result))
