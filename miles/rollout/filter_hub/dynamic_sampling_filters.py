"""Filters for ``--dynamic-sampling-filter-path``."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles.rollout.filter_hub.base_types import DynamicFilterOutput
from miles.utils.types import Sample

__all__ = ["check_no_aborted", "check_reward_nonzero_std"]


def check_reward_nonzero_std(args: Any, samples: list[Any], **kwargs: Any) -> DynamicFilterOutput:
    """Keep groups whose rewards differ: the others have no advantage to learn from."""
    rewards = np.array([float(sample.get_reward_value(args)) for sample in flat(samples)], dtype=np.float64)
    keep = bool(len(rewards) > 1 and rewards.std(ddof=1) > 1e-8)
    return DynamicFilterOutput(keep, None if keep else f"zero_std_{round(float(rewards[0]), 1)}")


def check_no_aborted(args: Any, samples: list[Any], **kwargs: Any) -> DynamicFilterOutput:
    """Keep groups without an aborted sample."""
    aborted = any(sample.status is Sample.Status.ABORTED for sample in flat(samples))
    return DynamicFilterOutput(not aborted, "group_has_aborted" if aborted else None)


def flat(samples: list[Any]) -> list[Sample]:
    """The samples of a group, also of those of its entries that are lists."""
    found: list[Sample] = []
    for entry in samples:
        found += entry if isinstance(entry, list) else [entry]
    return found
