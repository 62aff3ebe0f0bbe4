"""The numbers of liveness, in one place. All are seconds; all are flags of the agent and the controller."""

from __future__ import annotations

from dataclasses import dataclass

from miles_agents.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Timings:
    """Liveness and fencing numbers.

    The order ``beat < suspect < fence < dead`` is what makes fencing safe: an agent that cannot renew its lease
    has killed its workers (``fence_s`` after it *sent* the last beat that was answered) before the controller
    reuses their ranks (``dead_s`` after it *received* the last beat).
    """

    beat_s: float = 1.0
    suspect_s: float = 5.0
    fence_s: float = 15.0
    dead_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beat_s < self.suspect_s < self.fence_s < self.dead_s:
            raise InvalidTimings(
                f"timings beat_s={self.beat_s} suspect_s={self.suspect_s} fence_s={self.fence_s} dead_s={self.dead_s}",
                evidence="a node could be reused while its old workers still run",
                advice="Keep 0 < beat_s < suspect_s < fence_s < dead_s.",
            )


class InvalidTimings(ConfigError):
    """The liveness numbers contradict each other."""

    code = "E-CFG-001"
