"""Whom a training job tells how it goes: a console, the events of an embedding program. The base class tells nobody,
and keeps the state of the story (``RunProgress``), which the status page shows, too."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_controller import Controller

REWARDS_KEPT = 60


@dataclass
class RunProgress:
    """How far a run is.

    Attributes:
        run_id: The controller's; empty: there is none yet.
        num_rollout: Iterations in all; 0: not known yet.
        done: Iterations behind it.
        phase: What it does now: ``nodes``, ``start``, ``generate``, ``train``, ``save``, ``update``, ``evaluate``;
            empty: between them.
        phase_began: By ``time.monotonic``.
        finished, target, tokens: Of the phase: samples done, samples wanted (0: not known), tokens so far.
        metrics: Of the last iteration.
        rewards: Mean raw rewards of the last iterations, oldest first.
    """

    run_id: str = ""
    num_rollout: int = 0
    done: int = 0
    phase: str = ""
    phase_began: float = 0.0
    finished: int = 0
    target: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=REWARDS_KEPT))

    def plain(self) -> dict[str, Any]:
        """For the status page."""
        return {
            "phase": self.phase,
            "phase_s": time.monotonic() - self.phase_began if self.phase else 0.0,
            "num_rollout": self.num_rollout,
            "done": self.done,
            "finished": self.finished,
            "target": self.target,
            "tokens": self.tokens,
            "reward": self.rewards[-1] if self.rewards else None,
            "step_s": self.metrics.get("perf/step_time"),
        }


class Narrator:
    """Told by the job and its loop, always from the event loop.

    Attributes:
        shows_reward: False for supervised fine-tuning, which has none.
        progress: The story so far.
        controller: While there is one.
    """

    def __init__(self) -> None:
        self.shows_reward = True
        self.progress = RunProgress()
        self.controller: Controller | None = None

    @property
    def has_bars(self) -> bool:
        """Whether anybody sees what ``show`` would show: asking how far a phase is costs calls."""
        return False

    def say(self, text: str) -> None:
        """A line for a person."""

    def attached(self, controller: Controller) -> None:
        """The controller listens; nodes may join."""
        self.controller = controller
        self.progress.run_id = controller.run_id
        controller.describe_job = self.progress.plain

    def detached(self) -> None:
        """The controller ends now."""
        self.controller = None

    @contextmanager
    def bars(self, num_rollout: int, done: int) -> Iterator[None]:
        """The iterations of a run that has ``num_rollout`` in all and ``done`` behind it."""
        self.progress.num_rollout, self.progress.done = num_rollout, done
        yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the run does now, until left."""
        progress = self.progress
        progress.phase, progress.phase_began = name, time.monotonic()
        progress.finished = progress.target = progress.tokens = 0
        self.phase_changed()
        try:
            yield
        finally:
            progress.phase = ""
            progress.finished = progress.target = progress.tokens = 0

    def phase_changed(self) -> None:
        """``progress.phase`` is a new one."""

    def show(self, news: Mapping[str, Any]) -> None:
        """How far the phase is: ``finished`` of ``target`` samples, ``tokens`` so far."""
        progress = self.progress
        progress.finished, progress.tokens = int(news.get("finished") or 0), int(news.get("tokens") or 0)
        progress.target = int(news.get("target") or 0)

    def advance(self, rollouts_done: int) -> None:
        """An iteration is done."""
        self.progress.done = rollouts_done

    def measured(self, rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> None:
        """The metrics of every iteration, also of those that are not told."""
        self.progress.metrics = dict(metrics)
        if self.shows_reward and "rollout/raw_reward" in metrics:
            self.progress.rewards.append(metrics["rollout/raw_reward"])

    def step(self, rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> None:
        """An iteration is told."""

    def evaluated(self, rollouts_done: int, metrics: Mapping[str, float]) -> None:
        """An evaluation has ended."""

    def saved(self, rollout_id: int, path: str) -> None:
        """A checkpoint is complete."""
        self.say(f"saved {path}")

    def exported(self, rollout_id: int, path: str) -> None:
        """The model was written in Hugging Face's form."""
        self.say(f"exported {path}")

    def finish(
        self, first: Mapping[str, float], last: Mapping[str, float], examples: Sequence[Mapping[str, Any]]
    ) -> None:
        """The run is done: its first and last evaluation, and a few answers."""
