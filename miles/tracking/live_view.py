"""What the live part of the console shows: nodes, ranks, engines, the last step, reward, how far it is. Pure.

Every line fits the terminal, so that what was drawn can be taken away again; of a low terminal the most needed lines
are kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from miles.tracking.narrator import RunProgress

if TYPE_CHECKING:
    from miles_controller import Controller

TIME_FIELDS = (
    ("perf/rollout_time", "generate"),
    ("perf/train_time", "train"),
    ("perf/update_weights_time", "update"),
    ("perf/save_time", "save"),
)
MAX_WIDTH = 100
_LABEL = 10
_NAMED = 4
_GOOD = frozenset({"alive", "up", "ready", "serving"})
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Cluster:
    """What the run has: (name, state) of nodes, of meshes' ranks by mesh, of services."""

    nodes: tuple[tuple[str, str], ...] = ()
    meshes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    services: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, controller: Controller | None) -> Cluster:
        """As the controller sees it now."""
        if controller is None:
            return cls()
        members = controller.fabric.membership.members.values()
        return cls(
            tuple((member.node, member.state) for member in members),
            tuple((mesh.name, tuple(rank.state for rank in mesh.ranks)) for mesh in controller.meshes.living),
            tuple((service["name"], service["phase"]) for service in controller.services.snapshot()),
        )


def view_lines(
    progress: RunProgress,
    cluster: Cluster,
    *,
    width: int,
    height: int,
    now: float,
    began: float,
    run_dir: Path | None = None,
    is_ascii: bool = False,
) -> list[Text]:
    """The lines, top to bottom, at most ``height``, none wider than ``width``.

    Args:
        now, began: By ``time.monotonic``: this moment, the run's begin.
    """
    width = min(width, MAX_WIDTH)
    where = f"  {run_dir}" if run_dir is not None else ""
    lines = [
        (7, _line("run", f"{progress.run_id or 'begins'}  {_clock(now - began)}{where}")),
        (5, _states("nodes", cluster.nodes)),
        (6, _ranks(cluster.meshes)),
        (5, _states("services", cluster.services)),
        (4, _step(progress)),
        (3, _reward(progress, width, is_ascii=is_ascii)),
        (1, _phase(progress, now, width, is_ascii=is_ascii)),
        (2, _rollouts(progress, width, is_ascii=is_ascii)),
    ]
    there = [(order, line) for order, line in lines if line is not None]
    while len(there) > max(1, height):
        there.remove(max(there, key=lambda entry: entry[0]))
    for _, line in there:
        line.truncate(max(1, width - 1), overflow="crop" if is_ascii else "ellipsis")
    return [line for _, line in there]


def _line(label: str, text: str | Text) -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "bold"), text)


def _states(label: str, named: Sequence[tuple[str, str]]) -> Text | None:
    """``2 alive: node-0 node-1  1 suspect: node-2``, those in trouble first and in full."""
    if not named:
        return None
    counts = Counter(state for _, state in named)
    text = Text()
    for state, count in sorted(counts.items(), key=lambda item: item[0] in _GOOD):
        names = [name for name, its in named if its == state]
        shown = " ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
        text.append(f"{count} {state}", style="" if state in _GOOD else "yellow")
        text.append(f": {shown}  ", style="dim" if state in _GOOD else "yellow")
    return _line(label, text)


def _ranks(meshes: Iterable[tuple[str, tuple[str, ...]]]) -> Text | None:
    text = Text()
    for name, states in meshes:
        text.append(f"{name}: ", style="dim")
        for state, count in sorted(Counter(states).items(), key=lambda item: item[0] in _GOOD):
            text.append(f"{count} {state}  ", style="" if state in _GOOD else "yellow")
    return _line("ranks", text) if text else None


def _step(progress: RunProgress) -> Text | None:
    metrics = progress.metrics
    if not metrics:
        return None
    times = [f"{name} {metrics[key]:.1f}" for key, name in TIME_FIELDS if metrics.get(key, 0.0) >= 0.05]
    return _line("last step", f"{metrics.get('perf/step_time', 0.0):.1f} s  {'  '.join(times)}")


def _reward(progress: RunProgress, width: int, *, is_ascii: bool) -> Text | None:
    rewards = list(progress.rewards)
    if not rewards:
        return None
    text = Text(f"{rewards[-1]:.3f}  ")
    low, high = min(rewards), max(rewards)
    if not is_ascii and high > low:
        shown = rewards[-max(0, width - _LABEL - 12) :]
        text.append("".join(_LEVELS[int((value - low) / (high - low) * 7.999)] for value in shown), style="cyan")
    return _line("reward", text)


def _phase(progress: RunProgress, now: float, width: int, *, is_ascii: bool) -> Text | None:
    if not progress.phase:
        return None
    note = f"{progress.tokens} tokens" if progress.tokens else ""
    tail = f"{_clock(now - progress.phase_began)}  {note}"
    if not progress.target:
        return _line(progress.phase, tail)
    return _bar(progress.phase, progress.finished, progress.target, tail, width, is_ascii=is_ascii)


def _rollouts(progress: RunProgress, width: int, *, is_ascii: bool) -> Text | None:
    if not progress.num_rollout:
        return None
    return _bar("rollouts", progress.done, progress.num_rollout, "", width, is_ascii=is_ascii)


def _bar(label: str, done: int, total: int, tail: str, width: int, *, is_ascii: bool) -> Text:
    counts = f" {done}/{total}  {tail}"
    room = max(0, min(32, width - 1 - _LABEL - len(counts)))
    filled = round(room * min(1.0, done / total))
    full, empty = ("#", "-") if is_ascii else ("━", "─")
    return _line(label, Text.assemble((full * filled, "green"), (empty * (room - filled), "dim"), counts))


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def now() -> float:
    """The clock of ``view_lines``."""
    return time.monotonic()
