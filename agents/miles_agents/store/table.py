"""The pool of one node: which segment holds what, for whom, and who waits for room. Pure.

Consumes requests for room, commits, holds, releases, removals, deaths, and the outcome of its own effects; produces
effects: ``Grant``, ``Make``, ``Close``, ``Refuse``. Waits for nothing itself; who waits for room, or for its segment to
be made, is unblocked by a removal, a release, a death, the segment or the deadline.

A segment is being made, free, allocated (one owner writes it), committed (it holds objects) or being closed. Committed
ones go back to the free ones when all their objects are removed and nobody maps any of them.

Invariants: all segments together, also those being made or closed, are never larger than the limit; requests that go
first are served before the others, and each kind in the order in which it came, but for smaller ones that there is
room for, of which at most ``MOST_OVERTAKING`` pass the same one; every request ends by one Grant or Refuse, or by its
owner's giving up; an object that was committed stays until it is removed, whoever dies; memory that somebody maps is
never given to another.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from miles_agents.errors import InternalError
from miles_agents.store.layout import PAGE, align
from miles_agents.store.ref import Key

State: TypeAlias = Literal["making", "free", "allocated", "committed", "closing"]
MOST_OVERTAKING = 64
"""So many smaller requests may pass one that there is no room for: what it waits for may be done by who asks for them,
and if it is not, it must have its turn."""
_STEP = 64 * 1024
_FITTING = 2
"""A free segment up to so many times too large is used; beyond that it is closed and its memory used better."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who asks for room or maps an object. ``ident`` dies as one; ``label`` is for people."""

    ident: str
    label: str


@dataclass(frozen=True, slots=True)
class Grant:
    """The request has its segment, and may write it."""

    request: int
    segment: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Make:
    """Make a segment of that size; answer with ``made`` or ``make_failed``."""

    segment: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Close:
    """Give the segment's memory back to the system; answer with ``closed``."""

    segment: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request gets no room: its deadline has passed, or there is no memory (``why``)."""

    request: int
    why: str
    waited_s: float
    num_waiting: int


Effect: TypeAlias = Grant | Make | Close | Refuse


@dataclass(slots=True)
class StoredObject:
    """One committed object. ``holds``: hold number to who maps it."""

    key: Key
    segment: int
    offset: int
    nbytes: int
    removed: bool = False
    holds: dict[int, Owner] = field(default_factory=dict)


@dataclass(slots=True)
class Segment:
    """One segment. ``since``: when it came into its state; ``num_live``: its objects that can be got, or are mapped."""

    number: int
    capacity: int
    state: State
    since: float
    request: int | None = None
    owner: Owner | None = None
    objects: list[StoredObject] = field(default_factory=list)
    num_live: int = 0


@dataclass(slots=True)
class _Waiter:
    request: int
    owner: Owner
    nbytes: int
    deadline: float
    since: float
    goes_first: bool
    num_overtaken: int = 0


class PoolTable:
    """See the module's docstring.

    Args:
        limit_bytes: What all segments together may have.
        max_segments: How many there may be: each costs the agent a descriptor.
    """

    def __init__(self, limit_bytes: int, max_segments: int) -> None:
        self.limit_bytes = limit_bytes // PAGE * PAGE
        self.segments: dict[int, Segment] = {}
        self.objects: dict[Key, StoredObject] = {}
        self.num_waiting_max = 0
        self.max_segments = max_segments
        self.total_bytes = 0
        """What all segments have."""
        self._waiting: dict[int, _Waiter] = {}
        self._making: dict[int, _Waiter] = {}  # by segment: who waits for it to be made
        self._allocated: dict[int, Segment] = {}  # by request
        self._free_ones: list[tuple[int, float, int]] = []  # capacity, -since, number: sorted
        self._free_bytes = 0
        self._closing: dict[int, int] = {}  # segment: capacity
        self._holds: dict[tuple[str, int], StoredObject] = {}
        self._num_made = 0

    # -- looking ---------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """What the segments have that are not free."""
        return self.total_bytes - self._free_bytes

    @property
    def num_used(self) -> int:
        """How many segments are not free."""
        return len(self.segments) - len(self._free_ones)

    @property
    def num_holds(self) -> int:
        """Mappings of objects."""
        return len(self._holds)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    @property
    def next_deadline(self) -> float | None:
        """When ``tick`` is due."""
        waiters = itertools.chain(self._waiting.values(), self._making.values())
        return min((waiter.deadline for waiter in waiters), default=None)

    def find(self, key: Key) -> StoredObject | None:
        """The object of that name that can be read here."""
        found = self.objects.get(key)
        return found if found is not None and not found.removed else None

    # -- room ------------------------------------------------------------------------------------------------

    def ask(
        self, request: int, owner: Owner, nbytes: int, deadline: float, now: float, *, goes_first: bool = False
    ) -> list[Effect]:
        """Somebody wants room for ``nbytes``, at most ``limit_bytes``; ``goes_first``: before all who do not."""
        self._waiting[request] = _Waiter(request, owner, nbytes, deadline, now, goes_first)
        effects = self._serve(now)
        self.num_waiting_max = max(self.num_waiting_max, len(self._waiting))
        return effects

    def give_up(self, request: int, now: float) -> list[Effect]:
        """Whoever asked is not there any more: what it was granted and has not committed is free again."""
        self._waiting.pop(request, None)
        for number in [number for number, waiter in self._making.items() if waiter.request == request]:
            self._unwanted(number)
        written = self._allocated.get(request)
        if written is not None:
            self._free(written, now)
        return self._serve(now)

    def made(self, segment: int, now: float) -> list[Effect]:
        """A segment is there."""
        found, waiter = self._in_state(segment, "making"), self._making.pop(segment, None)
        if waiter is None:
            self._free(found, now)
            return self._serve(now)
        return [self._granted(found, waiter, now), *self._serve(now)]

    def make_failed(self, segment: int, why: str, now: float) -> list[Effect]:
        """There is no memory for it."""
        found, waiter = self._in_state(segment, "making"), self._making.pop(segment, None)
        self._forget(found)
        refused: list[Effect] = []
        if waiter is not None:
            refused.append(Refuse(waiter.request, why, now - waiter.since, len(self._waiting)))
        return [*refused, *self._serve(now)]

    def closed(self, segment: int, now: float) -> list[Effect]:
        """A segment's memory is the system's again."""
        self._forget(self._in_state(segment, "closing"))
        del self._closing[segment]
        return self._serve(now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: requests past their deadline are refused; a segment still being made becomes a free one."""
        late = [waiter for waiter in self._waiting.values() if waiter.deadline <= now]
        for waiter in late:
            del self._waiting[waiter.request]
        unmade = [number for number, waiter in self._making.items() if waiter.deadline <= now]
        late += [self._unwanted(number) for number in unmade]
        refused = [Refuse(waiter.request, "", now - waiter.since, len(self._waiting)) for waiter in late]
        return [*refused, *self._serve(now)] if late else []

    # -- objects ---------------------------------------------------------------------------------------------

    def commit(self, segment: int, request: int, parts: Sequence[tuple[Key, int, int]], now: float) -> None:
        """What lies in an allocated segment is objects from now on: ``(key, offset, nbytes)`` each."""
        found = self._in_state(segment, "allocated")
        if found.request != request or not parts:
            raise _broken(f"segment {segment} is not that of request {request}")
        del self._allocated[request]
        found.state, found.since, found.request, found.num_live = "committed", now, None, len(parts)
        found.objects = [StoredObject(key, segment, offset, nbytes) for key, offset, nbytes in parts]
        for stored in found.objects:
            self.objects[stored.key] = stored

    def hold(self, key: Key, hold: int, owner: Owner) -> StoredObject | None:
        """Somebody maps the object: until the release its memory is not given to others. None: it is not here.

        Raises ValueError if the owner has used that number for something that it still maps.
        """
        found = self.find(key)
        if found is None:
            return None
        if (owner.ident, hold) in self._holds:
            raise ValueError(f"hold {hold} is in use")
        found.holds[hold] = owner
        self._holds[owner.ident, hold] = found
        return found

    def release(self, ident: str, holds: Sequence[int], now: float) -> list[Effect]:
        """Those mappings are gone; unknown numbers are ignored."""
        freed = [self._release(ident, hold, now) for hold in holds]
        return self._serve(now) if any(freed) else []

    def remove(self, key: Key, now: float) -> list[Effect]:
        """Nobody can get the object from now on; whoever maps it keeps it."""
        found = self.find(key)
        if found is None:
            return []
        found.removed = True
        return self._serve(now) if not found.holds and self._one_less(found, now) else []

    def left_behind(self, label: str, token: str) -> list[StoredObject]:
        """What owners of that label put here that did not have this token: earlier lives of the same actor."""
        return [
            stored
            for segment in self.segments.values()
            if segment.owner is not None and segment.owner.label == label and not segment.owner.ident.startswith(token)
            for stored in segment.objects
            if not stored.removed
        ]

    def owner_gone(self, ident: str, now: float) -> list[Effect]:
        """A process is dead: what it asked for, writes and maps ends. What it committed stays."""
        for waiter in [waiter for waiter in self._waiting.values() if waiter.owner.ident == ident]:
            del self._waiting[waiter.request]
        for number in [number for number, waiter in self._making.items() if waiter.owner.ident == ident]:
            self._unwanted(number)
        for segment in list(self._allocated.values()):
            if segment.owner is not None and segment.owner.ident == ident:
                self._free(segment, now)
        for owner, hold in [held for held in self._holds if held[0] == ident]:
            self._release(owner, hold, now)
        return self._serve(now)

    # -- inside ----------------------------------------------------------------------------------------------

    def _serve(self, now: float) -> list[Effect]:
        """Grant requests in order; smaller ones that there is room for may pass one that there is none for."""
        effects: list[Effect] = []
        passed: list[_Waiter] = []
        for waiter in self._in_order() if self._waiting else ():
            if passed and waiter.nbytes >= passed[-1].nbytes:
                continue
            effect = self._room_for(waiter, now)
            if effect is None:
                if not passed:
                    effects += self._close_idle(self._capacity(waiter), now)
                passed.append(waiter)
            else:
                del self._waiting[waiter.request]
                effects.append(effect)
                for other in passed:
                    other.num_overtaken += 1
            if any(other.num_overtaken >= MOST_OVERTAKING for other in passed):
                break
        return effects

    def _in_order(self) -> Iterator[_Waiter]:
        waiting = list(self._waiting.values())
        yield from (waiter for waiter in waiting if waiter.goes_first)
        yield from (waiter for waiter in waiting if not waiter.goes_first)

    def _room_for(self, waiter: _Waiter, now: float) -> Grant | Make | None:
        fitting = self._take_best_fit(waiter.nbytes)
        if fitting is not None:
            return self._granted(fitting, waiter, now)
        capacity = self._capacity(waiter)
        if self.total_bytes + capacity > self.limit_bytes or len(self.segments) >= self.max_segments:
            return None
        self._num_made += 1
        made = Segment(self._num_made, capacity, "making", now, waiter.request, waiter.owner)
        self.segments[made.number] = made
        self.total_bytes += capacity
        self._making[made.number] = waiter
        return Make(made.number, capacity)

    def _capacity(self, waiter: _Waiter) -> int:
        return min(capacity_for(waiter.nbytes), self.limit_bytes)

    def _take_best_fit(self, nbytes: int) -> Segment | None:
        """The smallest free segment that fits, of several the one that was used last."""
        place = bisect.bisect_left(self._free_ones, (nbytes,))
        if place == len(self._free_ones) or self._free_ones[place][0] > max(_FITTING * nbytes, _STEP):
            return None
        capacity, _, number = self._free_ones.pop(place)
        self._free_bytes -= capacity
        return self.segments[number]

    def _close_idle(self, capacity: int, now: float) -> list[Effect]:
        """Close free segments, the longest idle first, until there will be room, or none is left."""
        room = self.limit_bytes - self.total_bytes + sum(self._closing.values())
        seats = self.max_segments - len(self.segments) + len(self._closing)
        effects: list[Effect] = []
        for free in sorted(self._free_ones, key=lambda one: (-one[1], one[2])):
            if room >= capacity and seats > 0:
                break
            segment = self.segments[free[2]]
            segment.state, segment.since = "closing", now
            self._free_ones.remove(free)
            self._free_bytes -= segment.capacity
            self._closing[segment.number] = segment.capacity
            room += segment.capacity
            seats += 1
            effects.append(Close(segment.number))
        return effects

    def _granted(self, segment: Segment, waiter: _Waiter, now: float) -> Grant:
        segment.state, segment.since = "allocated", now
        segment.request, segment.owner = waiter.request, waiter.owner
        self._allocated[waiter.request] = segment
        return Grant(waiter.request, segment.number, segment.capacity)

    def _unwanted(self, number: int) -> _Waiter:
        """Nobody waits for that segment to be made any more."""
        segment = self.segments[number]
        segment.request = segment.owner = None
        return self._making.pop(number)

    def _free(self, segment: Segment, now: float) -> None:
        if segment.request is not None:
            self._allocated.pop(segment.request, None)
        segment.state, segment.since, segment.request, segment.owner = "free", now, None, None
        for stored in segment.objects:
            if self.objects.get(stored.key) is stored:
                del self.objects[stored.key]
        segment.objects = []
        bisect.insort(self._free_ones, (segment.capacity, -now, segment.number))
        self._free_bytes += segment.capacity

    def _forget(self, segment: Segment) -> None:
        del self.segments[segment.number]
        self.total_bytes -= segment.capacity

    def _release(self, ident: str, hold: int, now: float) -> bool:
        stored = self._holds.pop((ident, hold), None)
        if stored is None:
            return False
        del stored.holds[hold]
        return stored.removed and not stored.holds and self._one_less(stored, now)

    def _one_less(self, stored: StoredObject, now: float) -> bool:
        """Nobody can read an object any more: its segment is free with the last of them. Whether it is."""
        segment = self.segments[stored.segment]
        segment.num_live -= 1
        if segment.num_live:
            return False
        self._free(segment, now)
        return True

    def _in_state(self, segment: int, state: State) -> Segment:
        found = self.segments.get(segment)
        if found is None or found.state != state:
            raise _broken(f"segment {segment} is {found.state if found else 'not there'}, not {state}")
        return found


def capacity_for(nbytes: int) -> int:
    """The size of a segment for so many bytes: a little more, so that the next object of about that size fits too."""
    step = _STEP
    while step * 32 < nbytes:
        step *= 2
    return align(max(nbytes, 1), step)


def _broken(why: str) -> InternalError:
    return InternalError("the store's table was told something that cannot be", evidence=why, advice="Report this.")
