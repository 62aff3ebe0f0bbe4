r"""Which zygotes there are, and what becomes of a worker that asks for one. Pure.

    (none) --ask--> starting --ready--> ready --died, ended--> (none), with its failures remembered
                       \--refused--> refused

Consumes: what workers ask for, what zygotes say, their ends, the clock. Produces: answers to workers, and orders to
start and to end zygotes. Invariants: at most one zygote per profile and ``most`` in all; one that is in use, or kept,
is never ended to make room or for being idle; a refusal holds for good, two failures in a row hold for ``rest_s``. A
profile stays kept when its zygote fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from miles_agents.agent.zygote_profile import Profile

State = Literal["starting", "ready"]
_MOST_REMEMBERED = 1000
_FAILURES_IN_A_ROW = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """``most``: zygotes at a time. ``idle_s``: an unused one is ended after so long. ``rest_s``: for so long a profile
    whose zygotes fail is left alone."""

    most: int = 4
    idle_s: float = 300.0
    rest_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Use:
    """A zygote of the profile lives, or is to be started (``start``); the zygotes in ``end`` make room for it.

    ``life`` tells the zygotes of one profile apart.
    """

    life: int
    start: bool = False
    end: tuple[Profile, ...] = ()


@dataclass(frozen=True, slots=True)
class No:
    """There is none for this worker, and why."""

    why: str


Answer: TypeAlias = Use | No


@dataclass(frozen=True, slots=True)
class Record:
    """One living zygote, number ``life``. ``users``: workers that wait for it or are being made by it; ``used_at``:
    when there last was one; ``made``: how many there were."""

    life: int
    state: State
    used_at: float
    users: int = 0
    kept: bool = False
    made: int = 0


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a profile gets no zygote. ``until``: when it may have one again; None: never."""

    why: str
    failures: int
    until: float | None


class ZygoteTable:
    """See the module's docstring."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._living: dict[Profile, Record] = {}
        self._troubles: dict[Profile, Trouble] = {}
        self._lives = 0
        self._kept: set[Profile] = set()

    @property
    def living(self) -> dict[Profile, Record]:
        """A copy."""
        return dict(self._living)

    def why_not(self, profile: Profile, now: float) -> str:
        """Why the profile gets no zygote; "" if it would, room permitting."""
        trouble = self._troubles.get(profile)
        if trouble is None or trouble.failures < _FAILURES_IN_A_ROW:
            return ""
        return trouble.why if trouble.until is None or now < trouble.until else ""

    def lives(self, profile: Profile) -> bool:
        """Whether a zygote of the profile starts or is ready."""
        return profile in self._living

    def ask(self, profile: Profile, now: float, *, keep: bool = False) -> Answer:
        """A worker wants a zygote. With ``Use`` it is a user until ``leave``. ``keep``: never end it for being idle."""
        why = self.why_not(profile, now)
        if why:
            return No(why)
        if keep:
            self._kept.add(profile)
        keep = profile in self._kept
        record = self._living.get(profile)
        if record is not None:
            changed = replace(record, users=record.users + 1, kept=record.kept or keep, used_at=now)
            self._living[profile] = changed
            return Use(record.life)
        room = self._make_room()
        if room is None:
            return No(f"all {self.limits.most} zygotes of this node are in use by other profiles")
        self._lives += 1
        self._living[profile] = Record(self._lives, "starting", now, users=1, kept=keep)
        return Use(self._lives, start=True, end=room)

    def leave(self, profile: Profile, life: int, now: float, *, made: bool) -> None:
        """A user has its worker (``made``), or does not want it any more."""
        record = self._of(profile, life)
        if record is not None:
            self._living[profile] = replace(record, users=record.users - 1, used_at=now, made=record.made + made)
        if made:
            self._troubles.pop(profile, None)

    def ready(self, profile: Profile, life: int) -> None:
        """The zygote has imported everything and is safe to fork."""
        record = self._of(profile, life)
        if record is not None:
            self._living[profile] = replace(record, state="ready")

    def refused(self, profile: Profile, life: int, why: str) -> bool:
        """The zygote says that it must not fork. For good: another one would be no different. False: old news."""
        if self._of(profile, life) is None:
            return False
        del self._living[profile]
        self._kept.discard(profile)
        self._note(profile, Trouble(why, _FAILURES_IN_A_ROW, None))
        return True

    def failed(self, profile: Profile, life: int, why: str, now: float) -> bool:
        """The zygote died, or could not make a worker, and is ended. False: old news."""
        if self._of(profile, life) is None:
            return False
        del self._living[profile]
        before = self._troubles.get(profile)
        recent = before is not None and (before.until is None or now < before.until)
        failures = before.failures + 1 if before is not None and recent else 1
        self._note(profile, Trouble(why, failures, now + self.limits.rest_s))
        return True

    def ended(self, profile: Profile) -> None:
        """The zygote was ended on purpose, and is kept no more."""
        self._living.pop(profile, None)
        self._kept.discard(profile)

    @property
    def keeps(self) -> bool:
        """Whether any profile is kept, with a zygote or without."""
        return bool(self._kept)

    def lacking(self, now: float) -> list[Profile]:
        """Kept profiles whose zygote failed, and that may have one again."""
        return [profile for profile in self._kept - self._living.keys() if not self.why_not(profile, now)]

    def keep_none(self) -> None:
        """Nothing is to be started any more but for workers."""
        self._kept.clear()

    def idle(self, now: float) -> list[Profile]:
        """Those that have been unused for too long; they are no longer among the living with this call."""
        old = [
            profile
            for profile, record in self._living.items()
            if _may_go(record) and now - record.used_at >= self.limits.idle_s
        ]
        for profile in old:
            del self._living[profile]
        return old

    def _of(self, profile: Profile, life: int) -> Record | None:
        record = self._living.get(profile)
        return record if record is not None and record.life == life else None

    def _make_room(self) -> tuple[Profile, ...] | None:
        if len(self._living) < self.limits.most:
            return ()
        free = [(record.used_at, profile) for profile, record in self._living.items() if _may_go(record)]
        if not free:
            return None
        _, oldest = min(free, key=lambda each: each[0])
        del self._living[oldest]
        return (oldest,)

    def _note(self, profile: Profile, trouble: Trouble) -> None:
        self._troubles.pop(profile, None)
        self._troubles[profile] = trouble
        while len(self._troubles) > _MOST_REMEMBERED:
            del self._troubles[next(iter(self._troubles))]


def _may_go(record: Record) -> bool:
    return not record.kept and not record.users
