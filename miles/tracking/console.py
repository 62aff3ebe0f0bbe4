"""What a person at the terminal sees of a training run: one line per iteration, and on a terminal a live view below.

The live view (``live_view``) is drawn in place and goes away at the end; elsewhere (a file, a pipe, a terminal that can
do nothing) only whole lines are written. A terminal that takes nothing (Ctrl-S) does not stop the run: lines wait until
it does, ``MAX_WAITING`` of them.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.tracking.live_area import LiveArea
from miles.tracking.live_view import TIME_FIELDS, Cluster, now, view_lines
from miles.tracking.metrics_file import eval_means
from miles.tracking.narrator import Narrator

TICK_S = 0.5
MAX_WAITING = 2000
AT_ONCE = 20
"""Lines between two ticks that are shown at once; each draws the live view again, so that more of them wait."""
_BATCH = 1000
_STEP_FIELDS = (
    ("rollout/raw_reward", "reward", 3),
    ("train/loss", "loss", 4),
    ("train/grad_norm", "grad", 3),
    ("train/kl_loss", "kl", 4),
    ("rollout/response_len/mean", "length", 1),
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")


class RunConsole(Narrator):
    """Writes to ``console`` (default: stdout).

    Args:
        is_live: Whether there is a live view; None: on an interactive terminal.
    """

    def __init__(self, console: Console | None = None, *, is_live: bool | None = None) -> None:
        super().__init__()
        self.console = console or Console(highlight=False)
        self.run_dir: Path | None = None
        self._is_live = can_be_live(self.console) if is_live is None else is_live
        self._area: LiveArea | None = None
        self._began = now()
        self._waiting: deque[str] = deque()
        self._num_dropped = 0
        self._at_once = AT_ONCE

    def say(self, text: str) -> None:
        """One plain line, however long."""
        area = self._area
        if area is None:
            self.console.print(Text(text), soft_wrap=True)
            return
        self._waiting.append(text)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._num_dropped += 1
        if self._at_once > 0 and area.can_write():
            self._at_once -= 1
            self._say_what_waits(area)

    def _say_what_waits(self, area: LiveArea) -> None:
        if self._num_dropped:
            self._waiting.appendleft(f"[{self._num_dropped} lines are left out: the terminal took none]")
            self._num_dropped = 0
        while self._waiting and area.can_write():
            some = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            area.print(Text("\n".join(some)), soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """The live view is there inside, if the terminal is fit for one."""
        if not self._is_live:
            yield
            return
        self._area = area = LiveArea(self.console, self._view)
        area.open()
        try:
            yield
        finally:
            self._area = None
            area.close()
            while self._waiting:
                self.say(self._waiting.popleft())

    async def tick(self) -> None:
        """Draw the live view again and again, until cancelled."""
        while self._area is not None:
            self._at_once = AT_ONCE
            self._say_what_waits(self._area)
            self._area.refresh()
            await asyncio.sleep(TICK_S)

    def _view(self, width: int, height: int) -> list[Text]:
        return view_lines(
            self.progress, Cluster.of(self.controller), width=width, height=height, now=now(), began=self._began,
            run_dir=self.run_dir, is_ascii=self.console.options.ascii_only,
        )  # fmt: skip

    @property
    def has_bars(self) -> bool:
        """Whether anybody sees what ``show`` would show."""
        return self._area is not None

    def phase_changed(self) -> None:
        """Shown at once: the loop may be busy for long before the next tick."""
        if self._area is not None:
            self._area.refresh()

    def step(self, rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> None:
        """The line of an iteration."""
        parts = [f"rollout {rollout_id + 1:>{len(str(num_rollout))}}/{num_rollout}"]
        for key, name, digits in _STEP_FIELDS:
            if key in metrics and (self.shows_reward or "reward" not in key):
                parts.append(f"{name} {round(metrics[key], digits) + 0.0:.{digits}f}")
        if cut := metrics.get("rollout/truncated_ratio"):
            parts.append(f"cut {cut:.0%}")
        times = [f"{name} {metrics[key]:.1f}" for key, name in TIME_FIELDS if metrics.get(key, 0.0) >= 0.05]
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


def can_be_live(console: Console) -> bool:
    """Whether lines can be drawn in place there: colours that were asked for in a pipe do not make it a terminal."""
    try:
        is_tty = os.isatty(console.file.fileno())
    except (OSError, ValueError):
        return False
    return is_tty and console.is_interactive and not console.is_dumb_terminal


def _short(value: Any, limit: int = 60) -> str:
    """For a cell: without the special tokens of chat templates, in one line."""
    if isinstance(value, list):  # a chat: what was asked last
        value = value[-1].get("content", value[-1]) if value and isinstance(value[-1], dict) else value
    text = " ".join(_SPECIAL_TOKEN.sub(" ", str(value)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
