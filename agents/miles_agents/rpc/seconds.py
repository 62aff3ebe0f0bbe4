"""Durations that a person gives: a number that is none would break the order of the loop's timers for everybody."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from miles_agents.errors import ConfigError


class NotADuration(ConfigError):
    """A timeout or a holding time that is not a finite number of seconds."""

    code = "E-CALL-014"


def checked_seconds(argument: str, value: Any, *, positive: bool = False) -> float | None:
    """``value`` as seconds; None stays None. A negative one is allowed unless ``positive``: it is over at once.

    Raises:
        NotADuration: anything else, NaN and infinity included; names the argument.
    """
    if value is None:
        return None
    try:
        seconds = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or (positive and seconds <= 0):
        raise NotADuration(
            f"{argument} is not a {'positive ' if positive else ''}finite number of seconds",
            evidence=f"{argument}={value!r:.100}",
            advice=f"Give seconds as a number; for no limit of its own, leave {argument} out or pass None.",
        )
    return seconds
