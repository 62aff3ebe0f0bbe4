"""What each iteration of the training loop does besides generating and training. Pure.

The rules are those of the reference system: evaluation before the first iteration, then after every
``--eval-interval`` iterations; a checkpoint after every ``--save-interval``; both also at the end of an epoch and after
the last iteration. ``--save`` without an interval saves the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cadence:
    """How often, in iterations. None: never, but for ``saves_last``. ``log_interval`` is for lines on the console."""

    eval_interval: int | None = None
    save_interval: int | None = None
    saves_last: bool = False
    eval_before_train: bool = True
    num_rollout_per_epoch: int | None = None
    log_interval: int = 1

    @classmethod
    def of(
        cls, config: Mapping[str, Any], *, trains: bool, generates: bool, num_rollout_per_epoch: int | None = None
    ) -> Cadence:
        """What the flags ask for, of a run that has a trainer, engines, or both."""
        return cls(
            eval_interval=config["eval_interval"] if generates else None,
            save_interval=config["save_interval"] if trains else None,
            saves_last=bool(config["save"]) and trains,
            eval_before_train=not config["skip_eval_before_train"],
            num_rollout_per_epoch=num_rollout_per_epoch,
            log_interval=config["log_interval"],
        )


@dataclass(frozen=True)
class Iteration:
    """One pass of the loop. ``rollout_id`` counts from 0 over all resumes of a run."""

    rollout_id: int
    evaluate_before: bool
    save: bool
    evaluate_after: bool
    is_last: bool
    is_told: bool = True


def iterations(cadence: Cadence, *, start: int, num_rollout: int, stop_after: int | None = None) -> Iterator[Iteration]:
    """The iterations from ``start`` up to ``num_rollout`` (excluded).

    Args:
        cadence: What happens how often.
        start: The first rollout id.
        num_rollout: Of the whole run; what is derived from it (the last iteration, the schedule) does not change with
            ``stop_after``.
        stop_after: End after so many iterations (``--debug-exit-after-rollout``).
    """
    end = num_rollout if stop_after is None else min(num_rollout, start + stop_after)
    for rollout_id in range(start, end):
        is_last = rollout_id == num_rollout - 1
        yield Iteration(
            rollout_id=rollout_id,
            evaluate_before=rollout_id == start and cadence.eval_interval is not None and cadence.eval_before_train,
            save=_is_due(cadence.save_interval, rollout_id, cadence.num_rollout_per_epoch, is_last)
            or (cadence.saves_last and is_last),
            evaluate_after=_is_due(cadence.eval_interval, rollout_id, cadence.num_rollout_per_epoch, is_last),
            is_last=is_last,
            is_told=is_last or rollout_id % cadence.log_interval == 0,
        )


def _is_due(interval: int | None, rollout_id: int, per_epoch: int | None, is_last: bool) -> bool:
    if interval is None:
        return False
    done = rollout_id + 1
    return is_last or done % interval == 0 or bool(per_epoch and done % per_epoch == 0)
