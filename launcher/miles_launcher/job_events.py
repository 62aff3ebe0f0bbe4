"""What an embedded job tells while it runs: frozen values, in the order in which things happened, ``Ended`` last."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from miles_agents.errors import MilesError

Outcome: TypeAlias = Literal["finished", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Base of all. ``at``: seconds since the epoch."""

    at: float = field(default_factory=time.time)

    def plain(self) -> dict[str, Any]:
        """For JSON: the fields, and the class's name as ``event``."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class NodeJoined(JobEvent):
    """A node can be used; ``text`` says what it has."""

    node: str
    text: str


@dataclass(frozen=True)
class NodeLost(JobEvent):
    """The controller has declared a node dead, it was said to be, or its agent has left unasked."""

    node: str
    why: str


@dataclass(frozen=True)
class Phase(JobEvent):
    """The job does something else now: ``nodes``, ``start``, ``generate``, ``train``, ``save``, ``update``,
    ``evaluate``."""

    name: str


@dataclass(frozen=True)
class Progress(JobEvent):
    """How far the phase is, a few times a second, while somebody listens. ``target`` 0: not known."""

    phase: str
    finished: int
    target: int
    tokens: int


@dataclass(frozen=True)
class Step(JobEvent):
    """An iteration is done: its metrics, by the names of docs/metrics.md."""

    rollout_id: int
    num_rollout: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Evaluated(JobEvent):
    """An evaluation is done, after so many iterations."""

    rollouts_done: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved(JobEvent):
    """A checkpoint is complete (``kind`` ``checkpoint``), or an export of the model (``hf``)."""

    kind: Literal["checkpoint", "hf"]
    rollout_id: int
    path: str


@dataclass(frozen=True)
class Recovered(JobEvent):
    """With ``--use-fault-tolerance``: something that had died is back. ``seconds`` is how long that took."""

    what: str
    text: str
    cause: str
    seconds: float


@dataclass(frozen=True)
class Trouble(JobEvent):
    """Something went wrong that does not end the job by itself; ``kind`` as in events.jsonl."""

    kind: str
    subject: str
    text: str


@dataclass(frozen=True)
class Said(JobEvent):
    """A line that a terminal would show."""

    text: str


@dataclass(frozen=True)
class Missed(JobEvent):
    """A listener that was slow has lost so many events."""

    count: int


@dataclass(frozen=True)
class Ended(JobEvent):
    """The last event: nothing of the job runs any more."""

    outcome: Outcome
    error: MilesError | None

    def plain(self) -> dict[str, Any]:
        """With the error's code and message in its place."""
        error = None if self.error is None else {"code": self.error.code, "text": str(self.error)}
        return {"event": "Ended", "at": self.at, "outcome": self.outcome, "error": error}
