"""What the recipe brings of its own, in the signatures that Miles calls: a reward, a filter, a line of log."""

from __future__ import annotations

import logging
from typing import Any

from miles.rollout.rm_hub.math_utils import grade_answer_verl
from miles.utils.types import Sample

log = logging.getLogger(__name__)
SHOWS_WORK = 0.1
"""What an answer that is worked out digit by digit gets on top."""


async def reward(args: Any, sample: Sample, **_: Any) -> float:
    """1 for a right answer in ``\\boxed{}``, and a little for working it out."""
    right = grade_answer_verl(sample.response, sample.label)
    return float(right) + (SHOWS_WORK if sample.response.count("=") >= 2 else 0.0)


def leave_out_unfinished(args: Any, data: list[list[Sample]]) -> None:
    """Answers that were cut off count in their group's mean, but are not learned from."""
    for group in data:
        for sample in group:
            sample.remove_sample = sample.status == Sample.Status.TRUNCATED


def log_rollout(rollout_id: int, args: Any, samples: Any, extra_metrics: dict[str, Any] | None, seconds: float) -> bool:
    """A line in the rollout manager's log; False: the usual metrics are logged as well."""
    shown = sum(sample.response.count("=") >= 2 for sample in samples)
    log.info("rollout %d: %d of %d answers show their work (%.1f s)", rollout_id, shown, len(samples), seconds)
    return False
