"""What a person at the terminal sees of a training run: bars for the run and its phase, one line per iteration.

On a terminal the bars are drawn in place, below the lines, and go away at the end; elsewhere (a file, a pipe) only
whole lines are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from miles.tracking.metrics_file import eval_means

_STEP_FIELDS = (
    ("rollout/raw_reward", "reward", 3),
    ("train/loss", "loss", 4),
    ("train/grad_norm", "grad", 3),
    ("train/kl_loss", "kl", 4),
    ("rollout/response_len/mean", "length", 1),
)
_TIME_FIELDS = (
    ("perf/rollout_time", "generate"),
    ("perf/train_time", "train"),
    ("perf/update_weights_time", "update"),
    ("perf/save_time", "save"),
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")


class RunConsole:
    """Writes to ``console`` (default: stdout).

    Attributes:
        shows_reward: False for supervised fine-tuning, which has none.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.shows_reward = True
        self._bars: Progress | None = None
        self._run: TaskID | None = None
        self._phase: TaskID | None = None

    def say(self, text: str) -> None:
        """One plain line, however long."""
        self.console.print(Text(text), soft_wrap=True)

    @contextmanager
    def bars(self, num_rollout: int, done: int) -> Iterator[None]:
        """The bars of a run that has ``num_rollout`` iterations in all and ``done`` behind it."""
        columns = (
            TextColumn("{task.description:<10}"), BarColumn(bar_width=32), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        is_off = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=is_off) as bars:
            self._run = bars.add_task("rollouts", total=num_rollout or None, completed=done, note="")
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None

    @property
    def has_bars(self) -> bool:
        """Whether anybody sees what ``show`` would show."""
        return self._bars is not None and not self._bars.disable

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the run does now, until left."""
        bars = self._bars
        if bars is None:
            yield
            return
        self._phase = phase = bars.add_task(name, total=None, note="")
        try:
            yield
        finally:
            self._phase = None
            bars.remove_task(phase)

    def show(self, news: Mapping[str, Any]) -> None:
        """How far the phase is: ``finished`` of ``target`` samples, ``tokens`` so far."""
        if self._bars is not None and self._phase is not None:
            target, tokens = news.get("target") or None, news.get("tokens", 0)
            note = f"{tokens} tokens" if tokens else ""
            self._bars.update(self._phase, completed=news.get("finished", 0), total=target, note=note)

    def advance(self, rollouts_done: int) -> None:
        """An iteration is done."""
        if self._bars is not None and self._run is not None:
            self._bars.update(self._run, completed=rollouts_done)

    def step(self, rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> None:
        """The line of an iteration."""
        parts = [f"rollout {rollout_id + 1:>{len(str(num_rollout))}}/{num_rollout}"]
        for key, name, digits in _STEP_FIELDS:
            if key in metrics and (self.shows_reward or "reward" not in key):
                parts.append(f"{name} {round(metrics[key], digits) + 0.0:.{digits}f}")
        if cut := metrics.get("rollout/truncated_ratio"):
            parts.append(f"cut {cut:.0%}")
        times = [f"{name} {metrics[key]:.1f}" for key, name in _TIME_FIELDS if metrics.get(key, 0.0) >= 0.05]
        total = metrics.get("perf/step_time", 0.0)
        self.say("  ".join(parts) + f"  {total:.1f} s" + (f" ({', '.join(times)})" if times else ""))

    def evaluated(self, rollouts_done: int, metrics: Mapping[str, float]) -> None:
        """The line of an evaluation."""
        means = {name: metrics[name] for name in eval_means(metrics)}
        text = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in means.items())
        self.say(f"eval after {rollouts_done} rollouts: {text}")

    def finish(
        self, first: Mapping[str, float], last: Mapping[str, float], examples: Sequence[Mapping[str, Any]]
    ) -> None:
        """What the run has done for each evaluation set, and a few answers of the trained model."""
        names = eval_means(last)
        if names:
            table = Table("held-out set", "before", "after", title="Mean reward", title_justify="left")
            for name in names:
                before = f"{first[name]:.3f}" if name in first else "-"
                table.add_row(Text(name.removeprefix("eval/")), before, f"{last[name]:.3f}")
            self.console.print(table)
        if examples:
            table = Table("prompt", "answer", "label", "reward", title="Sample answers", title_justify="left")
            for one in examples:
                cells = [_short(one.get(key)) for key in ("prompt", "response", "label", "reward")]
                table.add_row(*(Text(cell) for cell in cells))
            self.console.print(table)


def _short(value: Any, limit: int = 60) -> str:
    """For a cell: without the special tokens of chat templates, in one line."""
    if isinstance(value, list):  # a chat: what was asked last
        value = value[-1].get("content", value[-1]) if value and isinstance(value[-1], dict) else value
    text = " ".join(_SPECIAL_TOKEN.sub(" ", str(value)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
