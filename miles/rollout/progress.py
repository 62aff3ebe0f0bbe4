"""How far a rollout is: numbers that one thread counts and another reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Of the rollout manager.

    Attributes:
        phase: ``loading``, ``idle``, ``generate``, ``evaluate`` or ``convert``.
        rollout_id: Of the rollout under way, or the last one.
        finished: Prompt groups that were accepted (of an evaluation: samples).
        target: How many are wanted.
        tokens: Response tokens that engines have made for it.
        blocked_s: For how long the loop of user code has not answered; 0: it runs.
    """

    phase: str = "loading"
    rollout_id: int = -1
    finished: int = 0
    target: int = 0
    tokens: int = 0
    filtered: int = 0
    engine_errors: int = 0
    blocked_s: float = 0.0

    def begin(self, phase: str, rollout_id: int, target: int = 0) -> None:
        """A phase begins: counts start at 0."""
        self.phase, self.rollout_id, self.target = phase, rollout_id, target
        self.finished = self.tokens = self.filtered = self.engine_errors = 0

    def to_plain(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


progress_now = Progress()
"""Of this process."""
