"""The pool of one node: which segment holds what, for whom, and who waits for room. Pure.

Consumes requests for room, commits, holds, releases, removals, deaths, and the outcome of its own effects; produces
effects: ``Grant``, ``Make``, ``Close``, ``Refuse``. Waits for nothing itself; who waits for room is unblocked by a
removal, a release, a death or the deadline.

A segment is being made, free, allocated (one owner writes it), committed (it holds objects) or being closed. Committed
ones go back to the free ones when all their objects are removed and nobody maps any of them.

Invariants: all segments together, also those being made or closed, are never larger than the limit; requests are
granted in the order in which they came; every request ends by one Grant or Refuse, or by its owner's giving up; an
object that was committed stays until it is removed, whoever dies; memory that somebody maps is never given to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from miles_agents.errors import InternalError
from miles_agents.store.layout import PAGE, align
from miles_agents.store.ref import Key

State: TypeAlias = Literal["making", "free", "allocated", "committed", "closing"]
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
    """One segment. ``since``: when it came into its state."""

    number: int
    capacity: int
    state: State
    since: float
    request: int | None = None
    owner: Owner | None = None
    objects: list[StoredObject] = field(default_factory=list)


@dataclass(slots=True)
class _Waiter:
    request: int
    owner: Owner
    nbytes: int
    deadline: float
    since: float


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
        self._max_segments = max_segments
        self._waiting: dict[int, _Waiter] = {}
        self._holds: dict[tuple[str, int], StoredObject] = {}
        self._num_made = 0

    # -- looking ---------------------------------------------------------------------------------------------

    @property
    def total_bytes(self) -> int:
        """What all segments have."""
        return sum(segment.capacity for segment in self.segments.values())

    @property
    def used_bytes(self) -> int:
        """What the segments have that are not free."""
        return sum(segment.capacity for segment in self.segments.values() if segment.state != "free")

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
        return min((waiter.deadline for waiter in self._waiting.values()), default=None)

    def find(self, key: Key) -> StoredObject | None:
        """The object of that name that can be read here."""
        found = self.objects.get(key)
        return found if found is not None and not found.removed else None

    # -- room ------------------------------------------------------------------------------------------------

    def ask(self, request: int, owner: Owner, nbytes: int, deadline: float, now: float) -> list[Effect]:
        """Somebody wants room for ``nbytes``, at most ``limit_bytes``."""
        self._waiting[request] = _Waiter(request, owner, nbytes, deadline, now)
        effects = self._serve(now)
        self.num_waiting_max = max(self.num_waiting_max, len(self._waiting))
        return effects

    def give_up(self, request: int, now: float) -> list[Effect]:
        """Whoever asked is not there any more: what it was granted and has not committed is free again."""
        self._waiting.pop(request, None)
        for segment in self.segments.values():
            if segment.request == request and segment.state == "making":
                segment.request = segment.owner = None
            elif segment.request == request and segment.state == "allocated":
                self._free(segment, now)
        return self._serve(now)

    def made(self, segment: int, now: float) -> list[Effect]:
        """A segment is there."""
        found = self._in_state(segment, "making")
        if found.request is None:
            self._free(found, now)
            return self._serve(now)
        return [self._granted(found, found.request, now), *self._serve(now)]

    def make_failed(self, segment: int, why: str, now: float) -> list[Effect]:
        """There is no memory for it."""
        found = self._in_state(segment, "making")
        del self.segments[segment]
        refused: list[Effect] = []
        if found.request is not None:
            refused.append(Refuse(found.request, why, now - found.since, len(self._waiting)))
        return [*refused, *self._serve(now)]

    def closed(self, segment: int, now: float) -> list[Effect]:
        """A segment's memory is the system's again."""
        self._in_state(segment, "closing")
        del self.segments[segment]
        return self._serve(now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: requests past their deadline are refused."""
        late = [waiter for waiter in self._waiting.values() if waiter.deadline <= now]
        refused: list[Effect] = []
        for waiter in late:
            del self._waiting[waiter.request]
            refused.append(Refuse(waiter.request, "", now - waiter.since, len(self._waiting)))
        return [*refused, *self._serve(now)] if late else []

    # -- objects ---------------------------------------------------------------------------------------------

    def commit(self, segment: int, request: int, parts: Sequence[tuple[Key, int, int]], now: float) -> None:
        """What lies in an allocated segment is objects from now on: ``(key, offset, nbytes)`` each."""
        found = self._in_state(segment, "allocated")
        if found.request != request or not parts:
            raise _broken(f"segment {segment} is not that of request {request}")
        found.state, found.since, found.request = "committed", now, None
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
        for hold in holds:
            self._release(ident, hold, now)
        return self._serve(now)

    def remove(self, key: Key, now: float) -> list[Effect]:
        """Nobody can get the object from now on; whoever maps it keeps it."""
        found = self.find(key)
        if found is None:
            return []
        found.removed = True
        self._free_if_over(found, now)
        return self._serve(now)

    def owner_gone(self, ident: str, now: float) -> list[Effect]:
        """A process is dead: what it asked for, writes and maps ends. What it committed stays."""
        for waiter in [waiter for waiter in self._waiting.values() if waiter.owner.ident == ident]:
            del self._waiting[waiter.request]
        for segment in self.segments.values():
            if segment.owner is None or segment.owner.ident != ident:
                continue
            if segment.state == "making":
                segment.request = segment.owner = None
            elif segment.state == "allocated":
                self._free(segment, now)
        for owner, hold in [held for held in self._holds if held[0] == ident]:
            self._release(owner, hold, now)
        return self._serve(now)

    # -- inside ----------------------------------------------------------------------------------------------

    def _serve(self, now: float) -> list[Effect]:
        """Grant requests in order, for as long as there is room for the first."""
        effects: list[Effect] = []
        while self._waiting:
            waiter = next(iter(self._waiting.values()))
            fitting = self._best_fit(waiter.nbytes)
            if fitting is not None:
                del self._waiting[waiter.request]
                fitting.owner = waiter.owner
                effects.append(self._granted(fitting, waiter.request, now))
                continue
            capacity = min(capacity_for(waiter.nbytes), self.limit_bytes)
            if self.total_bytes + capacity > self.limit_bytes or len(self.segments) >= self._max_segments:
                effects += self._close_idle(capacity, now)
                break
            del self._waiting[waiter.request]
            self._num_made += 1
            made = Segment(self._num_made, capacity, "making", now, waiter.request, waiter.owner)
            self.segments[made.number] = made
            effects.append(Make(made.number, capacity))
        return effects

    def _best_fit(self, nbytes: int) -> Segment | None:
        most = max(_FITTING * nbytes, _STEP)
        free = (s for s in self.segments.values() if s.state == "free" and nbytes <= s.capacity <= most)
        return min(free, key=lambda s: (s.capacity, -s.since), default=None)

    def _close_idle(self, capacity: int, now: float) -> list[Effect]:
        """Close free segments, the longest idle first, until there will be room, or none is left."""
        ending = [segment for segment in self.segments.values() if segment.state == "closing"]
        idle = sorted((s for s in self.segments.values() if s.state == "free"), key=lambda s: s.since)
        room = self.limit_bytes - self.total_bytes + sum(segment.capacity for segment in ending)
        seats = self._max_segments - len(self.segments) + len(ending)
        effects: list[Effect] = []
        for segment in idle:
            if room >= capacity and seats > 0:
                break
            segment.state, segment.since = "closing", now
            room += segment.capacity
            seats += 1
            effects.append(Close(segment.number))
        return effects

    def _granted(self, segment: Segment, request: int, now: float) -> Grant:
        segment.state, segment.since, segment.request = "allocated", now, request
        return Grant(request, segment.number, segment.capacity)

    def _free(self, segment: Segment, now: float) -> None:
        segment.state, segment.since, segment.request, segment.owner = "free", now, None, None
        for stored in segment.objects:
            if self.objects.get(stored.key) is stored:
                del self.objects[stored.key]
        segment.objects = []

    def _release(self, ident: str, hold: int, now: float) -> None:
        stored = self._holds.pop((ident, hold), None)
        if stored is not None:
            del stored.holds[hold]
            self._free_if_over(stored, now)

    def _free_if_over(self, stored: StoredObject, now: float) -> None:
        segment = self.segments[stored.segment]
        if all(other.removed and not other.holds for other in segment.objects):
            self._free(segment, now)

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
