"""The contract of a tracker, and what it is told. Values only: they travel as JSON to the process of the trackers.

A tracker may block and may raise; it runs on a thread of its own (``shell``), in a process of its own (``host``), and
neither costs the run anything. Its methods are called one at a time, in order, ``begin`` first and ``finish`` last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from miles_agents.errors import ConfigError

TRAIN_AXIS = "train/step"
ROLLOUT_AXIS = "rollout/step"
EVAL_AXIS = "eval/step"
AXES = (ROLLOUT_AXIS, TRAIN_AXIS, EVAL_AXIS)
_AXIS_BY_PREFIX = {"train": TRAIN_AXIS, "eval": EVAL_AXIS}


class TrackerUnusable(ConfigError):
    """A tracker cannot be begun with what the flags and the machine give it."""

    code = "E-TRACK-001"


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run.

    Attributes:
        run_id: Of this run, unique.
        name: For people: the base name of the run directory.
        run_dir: Where files of trackers go unless a flag says otherwise.
        config: The resolved config without secrets.
        start_rollout_id: The first rollout of this run; above 0 it is a resumed one.
        first_steps: The first step of each axis that this run will write.
        settings: The flags that trackers read, by their keys in the config, and ``wandb_key``, which nobody else gets.
        versions: Of packages that matter, by name.
    """

    run_id: str
    name: str
    run_dir: str
    config: Mapping[str, Any]
    start_rollout_id: int = 0
    first_steps: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Inverse of ``RunInfo(**...)``."""
        return asdict(self)


@dataclass(frozen=True)
class Begun:
    """What ``begin`` has found.

    Attributes:
        remembered: What ``begin`` of a run that goes on from this one gets as ``before``. It is kept in files: no
            secrets.
        told: One line for the terminal: where to look.
    """

    remembered: dict[str, Any]
    told: str


@dataclass(frozen=True)
class Point:
    """Metrics of one moment.

    Attributes:
        steps: Where on each axis (``AXES``); at least one.
        metrics: By name.
        time: Seconds since the epoch.
    """

    steps: Mapping[str, int]
    metrics: Mapping[str, float]
    time: float

    def step_of(self, name: str) -> int:
        """Where a metric is drawn: by its own axis, else by the first that the point has."""
        return self.steps.get(axis_of(name), next(iter(self.steps.values())))


@dataclass(frozen=True)
class Examples:
    """A few answers, for people. ``rows`` have the keys ``dataset prompt response label reward``."""

    step: int
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How the run ended: ``finished``, ``failed`` or ``interrupted``."""

    how: str


class Tracker(Protocol):
    """See the module's docstring."""

    name: ClassVar[str]

    def begin(self, run: RunInfo, before: Mapping[str, Any]) -> Begun:
        """Open a new run, or go on with the one that ``before`` remembers."""

    def log(self, point: Point) -> None:
        """Record metrics."""

    def examples(self, examples: Examples) -> None:
        """Record answers, if the tracker has a place for texts."""

    def artefact(self, path: Path) -> None:
        """Record a small file, if the tracker has a place for files."""

    def finish(self, outcome: Outcome) -> str:
        """Write what is left and close. Returns a line for the terminal, or nothing."""


def axis_of(name: str) -> str:
    """The axis of a metric: optimizer steps for ``train/``, else rollouts, with an axis of its own for ``eval/``."""
    return _AXIS_BY_PREFIX.get(name.partition("/")[0], ROLLOUT_AXIS)


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Examples as a table."""
    names = ("dataset", "prompt", "response", "label", "reward")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
