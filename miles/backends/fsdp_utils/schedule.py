"""Learning rate and weight decay by step: the curves of Megatron's scheduler for the same flags."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from miles.backends.fsdp_utils.errors import FsdpFlagRefused

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_ANNEALINGS = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclass(frozen=True)
class Schedule:
    """Counts optimizer steps from 0. From 0 to ``warmup`` the rate rises linearly from ``initial`` to ``peak``; from
    there to ``decay`` it falls to ``minimum`` in the given style, and stays there."""

    style: str
    peak: float
    minimum: float
    initial: float
    warmup: int
    decay: int
    annealing: str
    annealing_steps: int
    weight_decay_start: float
    weight_decay_end: float
    weight_decay_style: str
    weight_decay_steps: int

    def learning_rate(self, step: int) -> float:
        """Of the step that comes after ``step`` others."""
        if self.warmup > 0 and step <= self.warmup:
            return self.initial + (self.peak - self.initial) * step / self.warmup
        if self.style == "constant":
            return self.peak
        if step > self.decay:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * math.sqrt(max(self.warmup, 1) / max(step, 1)))
        return self.minimum + (self.peak - self.minimum) * self._left(step)

    def weight_decay(self, step: int) -> float:
        """Of the step that comes after ``step`` others."""
        if self.weight_decay_style == "constant" or step > self.weight_decay_steps:
            return self.weight_decay_end
        part = step / self.weight_decay_steps
        if self.weight_decay_style == "cosine":
            part = 0.5 * (math.cos(math.pi * (1 - part)) + 1)
        return self.weight_decay_start + part * (self.weight_decay_end - self.weight_decay_start)

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def _left(self, step: int) -> float:
        """How much of the way from ``minimum`` to ``peak`` is left, 1 to 0."""
        if self.style == "WSD":
            return self._annealed(step)
        part = (step - self.warmup) / (self.decay - self.warmup)
        return 1 - part if self.style == "linear" else 0.5 * (math.cos(math.pi * part) + 1)

    def _annealed(self, step: int) -> float:
        start = self.decay - self.annealing_steps
        if step <= start:
            return 1.0
        part = (step - start) / self.annealing_steps
        curves = {
            "linear": 1 - part,
            "cosine": 0.5 * (math.cos(math.pi * part) + 1),
            "exponential": 2 * math.pow(0.5, part) - 1,
            "minus_sqrt": 1 - math.sqrt(part),
        }
        return curves[self.annealing]


def schedule_of(args: Any) -> Schedule:
    """Of the run's resolved flags.

    Raises:
        FsdpFlagRefused: They make no curve.
    """
    steps = _steps(args)
    decay = getattr(args, "lr_decay_iters", None) or steps
    fraction = getattr(args, "lr_warmup_fraction", None)
    warmup = int(fraction * decay) if fraction is not None else getattr(args, "lr_warmup_iters", 0)
    weight_decay = args.weight_decay
    start = getattr(args, "start_weight_decay", None)
    end = getattr(args, "end_weight_decay", None)
    schedule = Schedule(
        style=args.lr_decay_style,
        peak=args.lr,
        minimum=getattr(args, "min_lr", 0.0) or 0.0,
        initial=getattr(args, "lr_warmup_init", 0.0) or 0.0,
        warmup=warmup,
        decay=decay,
        annealing=getattr(args, "lr_wsd_decay_style", None) or "exponential",
        annealing_steps=getattr(args, "lr_wsd_decay_iters", None) or 0,
        weight_decay_start=weight_decay if start is None else start,
        weight_decay_end=weight_decay if end is None else end,
        weight_decay_style=getattr(args, "weight_decay_incr_style", "constant"),
        weight_decay_steps=steps,
    )
    _check(schedule)
    return schedule


def _steps(args: Any) -> int:
    """Of the whole run."""
    return max(1, (getattr(args, "num_rollout", None) or 1) * (getattr(args, "num_steps_per_rollout", None) or 1))


def _check(schedule: Schedule) -> None:
    if schedule.style not in STYLES:
        raise _refused(f"--lr-decay-style {schedule.style} is not known", f"known: {', '.join(STYLES)}")
    if schedule.style == "WSD" and (schedule.annealing not in _ANNEALINGS or schedule.annealing_steps < 1):
        known = f"--lr-wsd-decay-style is one of {', '.join(_ANNEALINGS)}"
        raise _refused("--lr-decay-style WSD needs --lr-wsd-decay-iters and a known style", known)
    if schedule.minimum > schedule.peak:
        raise _refused(f"--min-lr {schedule.minimum} is above --lr {schedule.peak}", "a rate falls to its minimum")
    if schedule.style != "constant" and schedule.warmup >= schedule.decay:
        raise _refused(
            f"warming up takes {schedule.warmup} steps, and the rate has fallen after {schedule.decay}",
            "--lr-warmup-iters (or -fraction) must be less than --lr-decay-iters, by default the steps of the run",
        )


def _refused(what: str, evidence: str) -> FsdpFlagRefused:
    return FsdpFlagRefused(what, evidence=evidence, advice="Change the flag that the first line names.")
