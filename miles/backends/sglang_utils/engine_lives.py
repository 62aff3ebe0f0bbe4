"""The lives of a fleet's engines and of its router: who is restarted when, and when that ends. Pure, without I/O.

* Consumes: deaths and failed starts (``Died``), what the shell has done (``Ended``, ``Started``, ``Rejoined``), whether
  engines may be started now (``Hold``), ``Tick``. Produces: ``Retire``, ``Start``, ``Recovered``, ``GiveUp``.
* A name is lived by one process after the other: serving, ending, backing off, starting, waiting (it is ready and has
  not the current weights), serving. Events of an earlier life change nothing.
* Invariants: ``Start`` comes only after ``Ended``, so there are never two processes of a name; restarts of a name stay
  within its budget; ``GiveUp`` comes once, and nothing is started after it.
* Engines of others cannot be started: they are gone for good, and the last one ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

from miles_controller.policy import Policy

ROUTER = "router"
BUDGET = Policy("restart", max_restarts=3, window_s=3600.0, backoff_s=1.0, backoff_cap_s=60.0)
"""Of each engine, and of the router."""


class Stage(Enum):
    """Where a name stands."""

    SERVING = "serving"
    ENDING = "ending"
    BACKOFF = "backoff"
    STARTING = "starting"
    WAITING = "waiting"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Died:
    """This life has ended, hangs, failed in a weight update, or could not be started. ``is_final``: it never will."""

    name: str
    number: int
    cause: str
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing of this life runs any more."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Started:
    """This life answers."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Rejoined:
    """This life gets requests, with weights of this version."""

    name: str
    number: int
    version: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing may be started (its memory is somebody else's), or it may again."""

    holds: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = Died | Ended | Started | Rejoined | Hold | Tick


@dataclass(frozen=True, slots=True)
class Retire:
    """Send nothing to this life any more, and end what is left of it; ``Ended`` follows."""

    name: str
    number: int
    cause: str


@dataclass(frozen=True, slots=True)
class Start:
    """Begin this life; ``Started`` or ``Died`` follows."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """It serves again. ``seconds``: since it was found; ``restarts``: that count against its budget now."""

    name: str
    cause: str
    seconds: float
    version: int
    restarts: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run cannot go on. ``causes``: of all that happened to ``name``, oldest first."""

    name: str
    reason: str
    causes: tuple[str, ...]


Effect: TypeAlias = Retire | Start | Recovered | GiveUp


@dataclass(frozen=True, slots=True)
class Life:
    """One name. ``number`` counts its lives from 1; ``down_at``: when it was found not to serve; ``start_at``: when the
    next life may begin; ``restarts``: times of those that count."""

    stage: Stage = Stage.SERVING
    number: int = 1
    down_at: float = 0.0
    start_at: float = 0.0
    restarts: tuple[float, ...] = ()
    cause: str = ""
    causes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lives:
    """The state. ``is_ours``: engines can be started. ``reason``: why it is over."""

    lives: Mapping[str, Life]
    policy: Policy = BUDGET
    is_ours: bool = True
    holds: bool = False
    reason: str = field(default="")

    @classmethod
    def of(cls, names: Iterable[str], *, policy: Policy = BUDGET, is_ours: bool = True) -> Lives:
        """All of them serve."""
        return cls(MappingProxyType({name: Life() for name in names}), policy, is_ours)

    def engines_in(self, *stages: Stage) -> list[str]:
        """Names of engines in one of these stages."""
        return [name for name, life in self.lives.items() if name != ROUTER and life.stage in stages]


Outcome: TypeAlias = tuple[Lives, list[Effect]]
_UP = (Stage.SERVING, Stage.STARTING, Stage.WAITING)


def wake_at(state: Lives) -> float | None:
    """When the next ``Tick`` has something to do."""
    if state.reason:
        return None
    return min((life.start_at for name, life in state.lives.items() if _may_start(state, name, life)), default=None)


def step(state: Lives, event: Event, now: float) -> Outcome:
    """What the event means at ``now``, in seconds of a clock that does not go back."""
    match event:
        case Hold(holds):
            return _start_those_due(replace(state, holds=holds), now)
        case Tick():
            return _start_those_due(state, now)
        case _:
            life = state.lives.get(event.name)
            if life is None or life.number != event.number:
                return state, []
            return _of_life(state, event, life, now)


def _of_life(state: Lives, event: Died | Ended | Started | Rejoined, life: Life, now: float) -> Outcome:
    match event, life.stage:
        case Died(), Stage.SERVING | Stage.STARTING | Stage.WAITING:
            return _died(state, event, life, now)
        case Ended(name), Stage.ENDING:
            return _start_those_due(_with(state, name, replace(life, stage=Stage.BACKOFF)), now)
        case Started(name), Stage.STARTING:
            return _with(state, name, replace(life, stage=Stage.WAITING)), []
        case Rejoined(name, _, version), Stage.WAITING:
            seconds = now - life.down_at
            effect = Recovered(name, life.cause, seconds, version, len(_recent(state, life, now)))
            return _with(state, name, replace(life, stage=Stage.SERVING)), [effect]
        case _:
            return state, []


def _died(state: Lives, event: Died, life: Life, now: float) -> Outcome:
    name, cause = event.name, event.cause
    if life.stage is Stage.SERVING:  # else it has not served since, and the first cause is what its absence is due to
        life = replace(life, down_at=now, cause=cause)
    life = replace(life, causes=(*life.causes, cause))
    retire = Retire(name, life.number, cause)
    if not state.is_ours and name != ROUTER:
        gone = _with(state, name, replace(life, stage=Stage.GONE))
        if gone.engines_in(*_UP):
            return gone, [retire]
        return _give_up(gone, name, f"no engine is left; the last: {cause}", retire)
    recent = _recent(state, life, now)
    ending = _with(state, name, replace(life, stage=Stage.ENDING, start_at=now + state.policy.backoff(len(recent))))
    if event.is_final:
        return _give_up(ending, name, f"{name} cannot be started again: {cause}", retire)
    if len(recent) >= state.policy.max_restarts:
        used_up = f"{len(recent)} restarts within {state.policy.window_s:g} s are used up"
        return _give_up(ending, name, f"{name} has failed {len(life.causes)} times, and {used_up}", retire)
    return ending, [retire]


def _give_up(state: Lives, name: str, reason: str, retire: Retire) -> Outcome:
    if state.reason:
        return state, [retire]
    return replace(state, reason=reason), [retire, GiveUp(name, reason, state.lives[name].causes)]


def _start_those_due(state: Lives, now: float) -> Outcome:
    effects: list[Effect] = []
    if state.reason:
        return state, effects
    for name, life in state.lives.items():
        if _may_start(state, name, life) and life.start_at <= now:
            restarts = (*_recent(state, life, now), now)
            state = _with(state, name, replace(life, stage=Stage.STARTING, number=life.number + 1, restarts=restarts))
            effects.append(Start(name, life.number + 1))
    return state, effects


def _may_start(state: Lives, name: str, life: Life) -> bool:
    """The router needs no memory of anybody."""
    return life.stage is Stage.BACKOFF and (name == ROUTER or not state.holds)


def _recent(state: Lives, life: Life, now: float) -> tuple[float, ...]:
    return tuple(at for at in life.restarts if now - at < state.policy.window_s)


def _with(state: Lives, name: str, life: Life) -> Lives:
    return replace(state, lives=MappingProxyType({**state.lives, name: life}))
