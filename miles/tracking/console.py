"""What a person at the terminal sees of a training run: a bar while answers are generated, one line per iteration.

On a terminal the bar is drawn in place and goes away; elsewhere (a file, a pipe) only whole lines are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_STEP_FIELDS = (
    ("rollout/raw_reward", "reward", "{:.3f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/grad_norm", "grad", "{:.3g}"),
    ("train/kl_loss", "kl", "{:.4f}"),
    ("rollout/response_len/mean", "len", "{:.1f}"),
    ("rollout/truncated_ratio", "cut", "{:.0%}"),
)
_TIME_FIELDS = (
    ("perf/rollout_time", "generate"),
    ("perf/train_time", "train"),
    ("perf/update_weights_time", "update"),
    ("perf/save_time", "save"),
    ("perf/eval_time", "eval"),
)


class RunConsole:
    """Writes to ``console`` (default: stdout)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(Text(text))

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """A progress bar that goes away; ``show`` moves it."""
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens"), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            progress.add_task(title, total=None, tokens=0)
            yield progress

    def show(self, bar: Progress, news: Mapping[str, Any]) -> None:
        """Move the bar: ``finished`` of ``target`` samples, ``tokens`` so far."""
        target = news.get("target") or None
        bar.update(bar.tasks[0].id, completed=news.get("finished", 0), total=target, tokens=news.get("tokens", 0))

    def step(self, rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> None:
        """One iteration is done."""
        width = len(str(num_rollout))
        parts = [f"rollout {rollout_id + 1:>{width}}/{num_rollout}"]
        parts += [f"{name} {form.format(metrics[key])}" for key, name, form in _STEP_FIELDS if key in metrics]
        times = [f"{name} {metrics[key]:.1f}" for key, name in _TIME_FIELDS if metrics.get(key, 0.0) >= 0.05]
        total = metrics.get("perf/step_time", 0.0)
        self.say("  ".join(parts) + f"  {total:.1f} s" + (f" ({', '.join(times)})" if times else ""))

    def evaluated(self, rollouts_done: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        means = {name: value for name, value in metrics.items() if _is_mean(name)}
        text = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in means.items())
        self.say(f"eval after {rollouts_done} rollouts: {text}")

    def finish(
        self, first: Mapping[str, float], last: Mapping[str, float], examples: Sequence[Mapping[str, Any]]
    ) -> None:
        """What the run has done for each evaluation set, and a few answers of the trained model."""
        names = [name for name in last if _is_mean(name)]
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


def _is_mean(name: str) -> bool:
    return name.startswith("eval/") and name.count("/") == 1 and "-" not in name


def _short(value: Any, limit: int = 60) -> str:
    if isinstance(value, list):  # a chat: what was asked last
        value = value[-1].get("content", value[-1]) if value and isinstance(value[-1], dict) else value
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
