"""What a tracker is still to be told: a bounded queue, pauses after failures, and what is said about both. Pure.

Invariants: items leave in order; what waits never exceeds the limit; an item is given up after ``MAX_TRIES`` tries, the
first of all (``begin``) together with everything else; each kind of trouble is said once.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

MAX_TRIES = 8
FIRST_PAUSE_S = 1.0
_LONGEST = 60.0
_AT_END = 0.5
T = TypeVar("T")

KEPT = "The run goes on; metrics.jsonl in the run directory has every metric."


class Delivery(Generic[T]):
    """See the module's docstring.

    Args:
        name: The tracker's.
        limit: How many items may wait.
        pause_s: After the first failure; it doubles up to 60 times as long, and is half as long at the end.
    """

    def __init__(self, name: str, limit: int, pause_s: float = FIRST_PAUSE_S) -> None:
        self.name = name
        self.pause_s = pause_s
        self.limit = max(2, limit)
        self.lost = 0
        """Items that were dropped or given up."""
        self.is_given_up = False
        self._items: deque[T] = deque()
        self._tries = 0
        self._pause_until = 0.0
        self._has_begun = False
        self._is_ending = False
        self._said: set[str] = set()

    @property
    def waiting(self) -> int:
        """Items that are not delivered yet."""
        return len(self._items)

    def put(self, item: T) -> list[str]:
        """One more; returns what is to be said. The oldest goes if there is no room, but never the first of all, nor
        one that is being delivered."""
        if self.is_given_up:
            self.lost += 1
            return []
        self._items.append(item)
        if len(self._items) <= self.limit:
            return []
        del self._items[1]
        self.lost += 1
        return self._once(
            "slow", f"{self.name} is too slow: {self.limit} records wait for it, and older ones are dropped. {KEPT}"
        )

    def end(self) -> None:
        """Nothing more will come: pauses are short from now on."""
        self._is_ending = True
        self._pause_until = min(self._pause_until, 0.0)

    def due(self, now: float) -> tuple[T | None, float | None]:
        """The item to deliver now, or None and the seconds to wait (None: until something comes)."""
        if not self._items:
            return None, None
        if now < self._pause_until:
            return None, self._pause_until - now
        return self._items[0], None

    def done(self) -> list[str]:
        """The item was delivered; returns what is to be said."""
        self._items.popleft()
        self._has_begun = True
        recovered = self._tries > 0
        self._tries = 0
        return self._once("recovered", f"{self.name} works again") if recovered else []

    def failed(self, now: float, error: str) -> list[str]:
        """The item was not; returns what is to be said."""
        self._tries += 1
        times = _AT_END if self._is_ending else min(_LONGEST, 2.0 ** (self._tries - 1))
        self._pause_until = now + self.pause_s * times
        said = self._once("failed", f"{self.name} failed and is tried again: {error}. {KEPT}")
        if self._tries < MAX_TRIES:
            return said
        self._tries = 0
        if self._has_begun:
            self._items.popleft()
            self.lost += 1
            return said
        return said + self.give_up(f"it could not begin in {MAX_TRIES} tries")

    def give_up(self, why: str) -> list[str]:
        """Nothing more is delivered."""
        self.is_given_up = True
        self.lost += len(self._items)
        self._items.clear()
        return self._once("given up", f"{self.name} is given up: {why}. {KEPT}")

    def _once(self, kind: str, text: str) -> list[str]:
        if kind in self._said:
            return []
        self._said.add(kind)
        return [text]
