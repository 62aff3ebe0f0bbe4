"""Named locks that can be awaited from anywhere: who holds what, who waits, in which order. Pure.

Consumes `Acquire`, `Release`, `Cancel`, `HolderDied`, `Tick`; produces `Grant`, `Released`, `Refuse`, `Expired`.
Waits for nothing itself; a waiter is unblocked by the holder's release, cancel, death or expired hold.

Invariants: a lock has at most one holder; waiters are served in the order in which they asked; every waiter ends by
a grant, its own cancel or its own death; tokens only grow, over all locks, so that a resource that remembers the
largest token it has seen can refuse whoever lost the lock without noticing; the dead hold nothing and never will.

A lock is not reentrant. Each request of a process is a waiter of its own, so that two tasks of one process exclude
each other like those of two; one that asks again for what it holds waits behind itself, until it gives up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from miles_agents.errors import InternalError, PeerFault


class StaleLockToken(PeerFault):
    """A lock was released that is no longer held under this token: it expired, or was released before."""

    code = "E-LOCK-002"


class DeadLockHolder(PeerFault):
    """A process asked for a lock after it had been declared dead."""

    code = "E-LOCK-003"


RefuseReason: TypeAlias = Literal["stale_token", "dead"]

MAX_GRAVES = 10_000
"""How many of the dead are remembered: requests of theirs may be under way only shortly after their death."""


@dataclass(frozen=True, slots=True)
class Holder:
    """One life of one actor."""

    mesh: int
    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"rank {self.rank} of mesh {self.mesh} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True)
class Waiter:
    """One request of one holder; the answer goes to it."""

    holder: Holder
    request: int


@dataclass(frozen=True, slots=True)
class Acquire:
    """A request for a lock. ``hold_s``: the longest that it may be held once granted; None: no limit."""

    name: str
    waiter: Waiter
    hold_s: float | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """The holder gives the lock back; ``by`` is the request that carried the release."""

    name: str
    by: Waiter
    token: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """The request was given up. If the grant was already under way, the lock is freed: nobody would release it."""

    waiter: Waiter


@dataclass(frozen=True, slots=True)
class HolderDied:
    """This life, and every earlier one of the same rank, is over."""

    holder: Holder


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: holds that are over expire."""


Event: TypeAlias = Acquire | Release | Cancel | HolderDied | Tick


@dataclass(frozen=True, slots=True)
class Grant:
    """The request has the lock, under this token."""

    name: str
    waiter: Waiter
    token: int


@dataclass(frozen=True, slots=True)
class Released:
    """The release was accepted."""

    name: str
    by: Waiter


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is over without effect; `refusal_error` makes the error of it."""

    name: str
    waiter: Waiter
    reason: RefuseReason
    evidence: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The holder lost the lock because it held it longer than it asked for."""

    name: str
    waiter: Waiter
    token: int


Effect: TypeAlias = Grant | Released | Refuse | Expired


@dataclass(frozen=True, slots=True)
class Held:
    """Who holds a lock since when, and until when at most."""

    waiter: Waiter
    token: int
    since: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that somebody holds. Free locks are not kept."""

    held: Held
    waiting: tuple[Acquire, ...] = ()


class Graves:
    """The newest dead incarnation of each ``(mesh, rank)``; of the latest ``MAX_GRAVES`` that died.

    All versions of a table share it and it is changed in place: who is dead stays dead.
    """

    def __init__(self) -> None:
        self._newest: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def find(self, holder: Holder) -> int | None:
        """The incarnation in whose grave this holder lies; None while it may live."""
        newest = self._newest.get((holder.mesh, holder.rank))
        return newest if newest is not None and holder.incarnation <= newest else None

    def dig(self, holder: Holder) -> None:
        """This life and all earlier ones of its rank are over."""
        key = (holder.mesh, holder.rank)
        self._newest[key] = max(holder.incarnation, self._newest.pop(key, holder.incarnation))
        if len(self._newest) > MAX_GRAVES:
            del self._newest[next(iter(self._newest))]


@dataclass(frozen=True, slots=True)
class LockTable:
    """All locks that are held, by name; copied on write.

    Attributes:
        last_token: The largest token given out so far.
        graves: Who asks in vain.
    """

    locks: Mapping[str, Lock] = field(default_factory=dict)
    last_token: int = 0
    graves: Graves = field(default_factory=Graves, compare=False)

    def next_expiry(self) -> float | None:
        """When the next `Tick` has something to do."""
        times = [lock.held.expires_at for lock in self.locks.values() if lock.held.expires_at is not None]
        return min(times, default=None)


def step(table: LockTable, event: Event, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    """Apply one event at time ``now`` (seconds of any clock that does not run backwards)."""
    match event:
        case Acquire():
            return _acquire(table, event, now)
        case Release():
            return _release(table, event, now)
        case Cancel(waiter):
            return _cancel(table, waiter, now)
        case HolderDied(holder):
            return _bury(table, holder, now)
        case Tick():
            return _expire(table, now)


def refusal_error(refuse: Refuse) -> StaleLockToken | DeadLockHolder:
    """The error that whoever was refused should see."""
    name, holder, evidence = refuse.name, refuse.waiter.holder, refuse.evidence
    match refuse.reason:
        case "stale_token":
            return StaleLockToken(
                f"lock {name!r} is no longer held by {holder} under this token",
                evidence=evidence,
                advice="Treat what was done under the lock as unprotected; give it a longer hold_s if it expired.",
                lock=name,
            )
        case "dead":
            return DeadLockHolder(
                f"lock {name!r} was asked for by {holder}, which is dead",
                evidence=evidence,
                advice="End this process; its successor has a new incarnation.",
                lock=name,
            )


def _acquire(table: LockTable, event: Acquire, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    newest_dead = table.graves.find(event.waiter.holder)
    if newest_dead is not None:
        evidence = f"incarnation {newest_dead} was declared dead"
        return table, (Refuse(event.name, event.waiter, "dead", evidence),)
    lock = table.locks.get(event.name)
    if lock is None:
        return _grant(table, event, (), now)
    return _with_lock(table, event.name, replace(lock, waiting=(*lock.waiting, event))), ()


def _release(table: LockTable, event: Release, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    lock = table.locks.get(event.name)
    if lock is not None and (lock.held.token, lock.held.waiter.holder) == (event.token, event.by.holder):
        table, effects = _pass_on(table, event.name, now)
        return table, (Released(event.name, event.by), *effects)
    state = f"held by {lock.held.waiter.holder} under token {lock.held.token}" if lock else "free"
    return table, (Refuse(event.name, event.by, "stale_token", f"token {event.token}; the lock is {state}"),)


def _cancel(table: LockTable, waiter: Waiter, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    for name, lock in table.locks.items():
        if lock.held.waiter == waiter:
            return _pass_on(table, name, now)
        waiting = tuple(other for other in lock.waiting if other.waiter != waiter)
        if len(waiting) != len(lock.waiting):
            return _with_lock(table, name, replace(lock, waiting=waiting)), ()
    return table, ()


def _bury(table: LockTable, dead: Holder, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    def gone(waiter: Waiter) -> bool:
        holder = waiter.holder
        return (holder.mesh, holder.rank) == (dead.mesh, dead.rank) and holder.incarnation <= dead.incarnation

    table.graves.dig(dead)
    effects: list[Effect] = []
    for name, lock in list(table.locks.items()):
        waiting = tuple(other for other in lock.waiting if not gone(other.waiter))
        if len(waiting) != len(lock.waiting):
            table = _with_lock(table, name, replace(lock, waiting=waiting))
        if gone(lock.held.waiter):
            table, more = _pass_on(table, name, now)
            effects += more
    return table, tuple(effects)


def _expire(table: LockTable, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    effects: list[Effect] = []
    for name, lock in list(table.locks.items()):
        held = lock.held
        if held.expires_at is not None and held.expires_at <= now:
            table, more = _pass_on(table, name, now)
            effects += [Expired(name, held.waiter, held.token), *more]
    return table, tuple(effects)


def _pass_on(table: LockTable, name: str, now: float) -> tuple[LockTable, tuple[Effect, ...]]:
    lock = table.locks.get(name)
    if lock is None:
        raise InternalError(f"lock {name!r} cannot be passed on", evidence="it is free", advice="Report this.")
    if lock.waiting:
        return _grant(table, lock.waiting[0], lock.waiting[1:], now)
    return replace(table, locks={other: kept for other, kept in table.locks.items() if other != name}), ()


def _grant(
    table: LockTable, event: Acquire, waiting: tuple[Acquire, ...], now: float
) -> tuple[LockTable, tuple[Effect, ...]]:
    token = table.last_token + 1
    expires_at = None if event.hold_s is None else now + event.hold_s
    lock = Lock(Held(event.waiter, token, now, expires_at), waiting)
    table = _with_lock(replace(table, last_token=token), event.name, lock)
    return table, (Grant(event.name, event.waiter, token),)


def _with_lock(table: LockTable, name: str, lock: Lock) -> LockTable:
    return replace(table, locks={**table.locks, name: lock})
