"""Forwarded log lines, shown when there is time: a flood from every node delays no call.

Consumes: batches of lines of nodes (``take``), one at a time from each. Produces: lines for ``show``, a few at a time;
for each batch the pause that its node is to make before the next. Waits for: its turn; after a few lines, everything
else that is ready on the loop goes first, and lines get no more than a fifth of the loop's time. Invariants: lines of a
node stay in order; what is held is bounded (a batch for each node, as long as nodes keep their pauses, and ``MAX_HELD``
if they do not); all nodes together are shown at no more than ``RATE_BYTES`` a second, however many there are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

SLICE_LINES = 50
_REST = 4.0
"""After a slice, lines rest for so many times as long as it took: they have a fifth of the loop's time."""
RATE_BYTES = 1024 * 1024
"""A second, of all nodes: some ten thousand lines, far more than a person reads."""
BURST_BYTES = 1024 * 1024
MAX_HELD = 32 * 1024 * 1024


class LogBudget:
    """Who may send how much when, so that all nodes together keep to a rate. Pure.

    Args:
        rate: Bytes a second of all nodes.
        burst: Bytes that may come at once after a quiet time.
    """

    def __init__(self, rate: float = RATE_BYTES, burst: float = BURST_BYTES) -> None:
        self._rate = rate
        self._burst_s = burst / rate
        self._paid_until = 0.0

    def take(self, size: int, now: float) -> float:
        """So many bytes came; returns for how many seconds their sender is to pause."""
        self._paid_until = max(self._paid_until, now) + size / self._rate
        return max(0.0, self._paid_until - now - self._burst_s)


class LogIntake:
    """See the module's docstring. ``show`` must not raise; ``refuse`` counts batches that there is no room for."""

    def __init__(
        self, show: Callable[[str], None], refuse: Callable[[], object], budget: LogBudget | None = None
    ) -> None:
        self._show = show
        self._refuse = refuse
        self._budget = budget or LogBudget()
        self._loop = asyncio.get_running_loop()
        self._held: deque[tuple[float, int, Iterator[str]]] = deque()
        self._held_bytes = 0
        self._delay_s = 0.0
        self._is_resting = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def delay_s(self) -> float:
        """How long the lines shown last have waited."""
        return self._delay_s

    def take(self, lines: Iterator[str], size: int) -> float:
        """A batch of so many bytes. Returns for how many seconds its node is to pause."""
        now = self._loop.time()
        pause_s = max(self._budget.take(size, now), self._delay_s)
        if self._held_bytes + size > MAX_HELD:
            self._refuse()
            return pause_s
        self._held.append((now, size, lines))
        self._held_bytes += size
        if not self._is_resting:
            self._work()
        return pause_s

    def close(self) -> None:
        """Show what is held, and rest for good."""
        if self._timer is not None:
            self._timer.cancel()
        while self._held:
            self._some_lines()

    def _work(self) -> None:
        """Show a few lines, then let everything go first that is ready by then."""
        self._is_resting = True
        began = self._loop.time()
        self._some_lines()
        self._loop.call_soon(self._rest, began)

    def _rest(self, began: float) -> None:
        # What else ran meanwhile counts, too: lines yield to a loop that is busy with other things.
        took = self._loop.time() - began
        self._timer = self._loop.call_later(_REST * took, self._go_on)

    def _go_on(self) -> None:
        if self._held:
            self._work()
        else:
            self._is_resting = False
            self._delay_s = 0.0

    def _some_lines(self) -> None:
        left = SLICE_LINES
        while self._held and left > 0:
            since, size, lines = self._held[0]
            self._delay_s = self._loop.time() - since
            for line in lines:
                self._show(line)
                left -= 1
                if left == 0:
                    return
            self._held.popleft()
            self._held_bytes -= size
