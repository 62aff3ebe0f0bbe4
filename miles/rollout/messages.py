"""What the rollout manager answers. Plain values that travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles_agents import Ref, register_type


@register_type
@dataclass(frozen=True)
class RolloutBatchRefs:
    """One rollout's train data in the store.

    Attributes:
        refs: By data-parallel rank; the order of the list.
        metrics: ``rollout/...`` and ``perf/...``.
        num_samples: In all parts together.
    """

    refs: list[Ref]
    metrics: dict[str, float]
    num_samples: int


@register_type
@dataclass(frozen=True)
class EvalResult:
    """One evaluation.

    Attributes:
        metrics: ``eval/...``.
        examples: A few answers: ``{"dataset", "prompt", "response", "label", "reward"}``.
    """

    metrics: dict[str, float]
    examples: list[dict[str, Any]]
