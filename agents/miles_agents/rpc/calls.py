"""The caller's bookkeeping: which receivers of which call have not answered. Pure; no I/O.

Consumes: calls that are opened; answers; deadlines; cancellation. Produces: what each sink is told, and which
receivers are to be told to stop. Invariants: a call ends exactly once; an answer reaches the sink at most once per
receiver; an answer to a call that is over, or from somebody who was not asked, is counted and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from miles_agents.wire.envelope import Address, Target


class Sink(Protocol):
    """Who waits for the answers of one call. Positions count in the mesh that was called."""

    fail_fast: bool
    """End the call at its first error."""

    def on_value(self, position: int, value: Any) -> None:
        """A receiver answered."""

    def on_error(self, position: int, error: BaseException) -> None:
        """A receiver failed."""

    def on_item(self, position: int, item: Any) -> None:
        """A generator endpoint yielded."""

    def on_end(self, position: int) -> None:
        """A generator endpoint finished."""

    def on_settled(self) -> None:
        """Nothing more will come."""


@dataclass(slots=True)
class OpenCall:
    """One call and the receivers that still owe an answer, by rank."""

    rid: int
    mesh: int
    method: str
    owing: dict[int, Target]
    sink: Sink
    started_at: float
    num_bytes: int
    cancelling: bool = False
    lane: str = "main"
    """Calls of one lane share a window; a full one does not hold up another (``io`` answers while ``main`` is busy)."""


@dataclass(slots=True)
class CallStats:
    """Counters since the start."""

    opened: int = 0
    settled: int = 0
    late: int = 0


MAX_CHOSEN = 10_000
"""Ranks of which it is known when they were last chosen; the one chosen longest ago is forgotten first."""


class CallTable:
    """All calls of one process that are not over."""

    def __init__(self) -> None:
        self._open: dict[int, OpenCall] = {}
        self._owed: dict[tuple[int, int], int] = {}  # answers by (mesh, rank); no zeros
        self._chosen: dict[tuple[int, int], int] = {}  # when a rank was last chosen, in turns
        self._turn = 0
        self.stats = CallStats()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenCall]:
        return iter(self._open.values())

    def open(self, call: OpenCall) -> None:
        """Begin to wait for a call."""
        self._open[call.rid] = call
        self.stats.opened += 1
        for rank in call.owing:
            key = (call.mesh, rank)
            self._owed[key] = self._owed.get(key, 0) + 1

    def get(self, rid: int) -> OpenCall | None:
        """The call, if it is not over."""
        return self._open.get(rid)

    def least_owing(self, mesh: int, targets: list[Target]) -> Target:
        """Of ``targets``, the one that owes the fewest answers; the least recently chosen among equals."""

        def debt(target: Target) -> tuple[int, int]:
            key = (mesh, target.rank)
            return self._owed.get(key, 0), self._chosen.get(key, 0)

        least = min(targets, key=debt)
        self._turn += 1
        self._chosen.pop((mesh, least.rank), None)  # the dict is in order of turns
        self._chosen[mesh, least.rank] = self._turn
        if len(self._chosen) > MAX_CHOSEN:
            del self._chosen[next(iter(self._chosen))]
        return least

    def value(self, rid: int, source: Address, value: Any) -> OpenCall | None:
        """An answer came. Returns the call if this ended it."""
        call = self._answered(rid, source)
        if call is None:
            return None
        call.sink.on_value(self._paid(call, source.rank).position, value)
        return self._settle_if_complete(call)

    def end(self, rid: int, source: Address) -> OpenCall | None:
        """A generator finished. Returns the call if this ended it."""
        call = self._answered(rid, source)
        if call is None:
            return None
        call.sink.on_end(self._paid(call, source.rank).position)
        return self._settle_if_complete(call)

    def item(self, rid: int, source: Address, item: Any) -> bool:
        """A generator yielded. False if nobody waits for it."""
        call = self._answered(rid, source)
        if call is None:
            return False
        call.sink.on_item(call.owing[source.rank].position, item)
        return True

    def error(self, rid: int, source: Address, error: BaseException) -> tuple[OpenCall | None, list[Target]]:
        """A receiver failed. Returns the call if this ended it, and who must be told to stop."""
        call = self._answered(rid, source)
        if call is None:
            return None, []
        call.sink.on_error(self._paid(call, source.rank).position, error)
        if not call.sink.fail_fast:
            return self._settle_if_complete(call), []
        outstanding = self._forgiven(call)
        self._settle(call)
        return call, outstanding

    def fail(self, rid: int, error: BaseException) -> tuple[OpenCall | None, list[Target]]:
        """Everything outstanding fails from this side (deadline, shutdown, nobody waits any more).

        Returns the call, and who must be told to stop.
        """
        call = self._open.get(rid)
        if call is None:
            return None, []
        positions = [target.position for target in call.owing.values()]
        outstanding = self._forgiven(call)
        for position in positions:
            call.sink.on_error(position, error)
            if call.sink.fail_fast:
                break
        self._settle(call)
        return call, outstanding

    def cancel(self, rid: int) -> list[Target]:
        """Ask to stop; the call ends when its receivers confirm. Returns who must be told (once)."""
        call = self._open.get(rid)
        if call is None or call.cancelling:
            return []
        call.cancelling = True
        return list(call.owing.values())

    def is_owed(self, rid: int, source: Address) -> bool:
        """Whether a call still waits for this receiver; if not, its answer is counted as late."""
        return self._answered(rid, source) is not None

    def _answered(self, rid: int, source: Address) -> OpenCall | None:
        call = self._open.get(rid)
        if call is not None and call.mesh == source[0]:
            target = call.owing.get(source[1])
            if target is not None and target[1] == source[2]:
                return call
        self.stats.late += 1
        return None

    def _paid(self, call: OpenCall, rank: int) -> Target:
        key = (call.mesh, rank)
        left = self._owed[key] - 1
        if left:
            self._owed[key] = left
        else:
            del self._owed[key]
        return call.owing.pop(rank)

    def _forgiven(self, call: OpenCall) -> list[Target]:
        """Nobody owes the call anything any more. Returns those who do not know that yet."""
        outstanding = [self._paid(call, rank) for rank in list(call.owing)]
        return [] if call.cancelling else outstanding

    def _settle_if_complete(self, call: OpenCall) -> OpenCall | None:
        if call.owing:
            return None
        self._settle(call)
        return call

    def _settle(self, call: OpenCall) -> None:
        del self._open[call.rid]
        self.stats.settled += 1
        call.sink.on_settled()


MAX_CALLS = 1000
MAX_BYTES = 64 * 1024 * 1024
MAX_WAITING_CALLS = 100_000
MAX_WAITING_BYTES = 1024 * 1024 * 1024


class Window:
    """How many calls and bytes may be unanswered at one mesh; the rest waits here, in order."""

    def __init__(self, *, max_calls: int = MAX_CALLS, max_bytes: int = MAX_BYTES) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self.calls = 0
        self.bytes = 0
        self._waiting: dict[int, int] = {}
        self._waiting_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Calls that wait for room."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is unanswered and nothing waits."""
        return self.calls == 0 and not self._waiting

    def is_overfull(self, num_bytes: int) -> bool:
        """Whether even waiting is refused."""
        return (
            len(self._waiting) >= MAX_WAITING_CALLS
            or self._waiting_bytes + num_bytes > MAX_WAITING_BYTES + self._max_bytes
        )

    def admit(self, rid: int, num_bytes: int) -> bool:
        """True: send it now. False: it waits, and ``leave`` will name it in its turn."""
        if not self._waiting and self._fits(num_bytes):
            self.calls += 1
            self.bytes += num_bytes
            return True
        self._waiting[rid] = num_bytes
        self._waiting_bytes += num_bytes
        return False

    def leave(self, rid: int, num_bytes: int) -> list[int]:
        """A call is over. Returns the waiting calls that may go now, oldest first."""
        ready: list[int] = []
        if not self._waiting:
            self.calls -= 1
            self.bytes -= num_bytes
            return ready
        if rid in self._waiting:
            self._waiting_bytes -= self._waiting.pop(rid)
        else:
            self.calls -= 1
            self.bytes -= num_bytes
        while self._waiting:
            first = next(iter(self._waiting))
            size = self._waiting[first]
            if not self._fits(size):
                break
            del self._waiting[first]
            self._waiting_bytes -= size
            self.calls += 1
            self.bytes += size
            ready.append(first)
        return ready

    def is_waiting(self, rid: int) -> bool:
        """Whether the call was not sent yet."""
        return rid in self._waiting

    def _fits(self, num_bytes: int) -> bool:
        return self.calls == 0 or (self.calls < self._max_calls and self.bytes + num_bytes <= self._max_bytes)
