"""What ``reaction`` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reaction:
    """Seconds since the cut: a call to a rank there has its error, the node is dead, the mesh has failed, which is what
    the job decides by."""

    error_s: float
    dead_s: float
    decision_s: float
