"""Which weights every engine holds, and the transaction that gives them new ones: a pure state machine, without I/O.

* Consumes: events (an update begins, an engine is done with a step or has failed, the weights are sent, an engine
  comes or goes). Produces: a new state, and effects for the shell to carry out.
* An update goes through its steps with all its engines in step: pause, flush, open, send, commit, close, resume. The
  shell answers each ``Do`` with one ``StepDone`` or ``EngineFailed`` per engine, and ``Send`` with ``Sent`` or
  ``SendFailed``.
* A catch-up goes through the same steps with the engines that are stale, and gives them the committed version.
* Invariants: versions only grow; an engine is resumed only with exactly the weights of the version that it reports; one
  that failed in an update is fenced and never resumed; one that comes without the current version (``Joined``) does
  not generate before an update has given it one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

from miles_agents.errors import InternalError


class UpdateOutOfOrder(InternalError):
    """An event of weight updates came when it cannot."""

    code = "E-WUP-004"


class Step(Enum):
    """Of an update, in order."""

    PAUSE = "pause"
    FLUSH = "flush"
    OPEN = "open"
    SEND = "send"
    COMMIT = "commit"
    CLOSE = "close"
    RESUME = "resume"


_ORDER = tuple(Step)


class Holds(Enum):
    """What an engine has. ``CURRENT``: the committed version. ``STALE``: an older one, or one that nobody knows; it
    waits, paused or unused, for an update. ``FENCED``: it failed in an update and counts no more."""

    CURRENT = "current"
    STALE = "stale"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Begin:
    """An update to this version begins."""

    version: int


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Stale engines get the committed version. Only while the trainer's weights still are that version."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """An engine has done what the current step asks."""

    engine: str
    step: Step


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """An engine has failed, or died, now."""

    engine: str
    why: str


@dataclass(frozen=True, slots=True)
class Sent:
    """The trainer has sent everything, and every engine of the update has taken it."""


@dataclass(frozen=True, slots=True)
class SendFailed:
    """The trainer could not send everything. ``engines`` have missed something; none named: nobody knows, so all."""

    engines: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Joined:
    """An engine has come (back). ``version``: what it holds; None: nobody knows."""

    engine: str
    version: int | None


@dataclass(frozen=True, slots=True)
class Left:
    """An engine is gone for good."""

    engine: str


Event: TypeAlias = Begin | CatchUp | StepDone | EngineFailed | Sent | SendFailed | Joined | Left


@dataclass(frozen=True, slots=True)
class Do:
    """Have these engines do the step, each."""

    step: Step
    engines: tuple[str, ...]
    version: int


@dataclass(frozen=True, slots=True)
class Send:
    """Have the trainer send its weights to these engines."""

    engines: tuple[str, ...]
    version: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Let nothing come from or go to this engine any more."""

    engine: str
    why: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The update, or catch-up, is over: ``engines`` generate with ``version``; none: it has failed."""

    version: int
    engines: tuple[str, ...]


Effect: TypeAlias = Do | Send | Fence | Finished


@dataclass(frozen=True, slots=True)
class Update:
    """One that is under way. ``waiting``: engines that have not done the current step. ``is_catch_up``: ``version`` was
    committed before, and other engines have it."""

    version: int
    step: Step
    engines: frozenset[str]
    waiting: frozenset[str]
    is_catch_up: bool = False


@dataclass(frozen=True, slots=True)
class Versions:
    """The state. ``version``: the last one that was committed; 0: what engines have loaded from disk."""

    version: int = 0
    engines: Mapping[str, Holds] = field(default_factory=lambda: MappingProxyType({}))
    update: Update | None = None


Outcome: TypeAlias = tuple[Versions, list[Effect]]


def step(state: Versions, event: Event) -> Outcome:
    """What the event means. Raises UpdateOutOfOrder if it cannot come now; what comes late changes nothing."""
    match event:
        case Begin(version):
            return _begin(state, version)
        case CatchUp():
            return _begin_catch_up(state)
        case StepDone(engine, of_step):
            return _step_done(state, engine, of_step)
        case Sent():
            update = _sending(state, event)
            return _enter(state, replace(update, waiting=frozenset()))
        case SendFailed(engines, why):
            update = _sending(state, event)
            # Those that are named may have been fenced already: then nobody else has missed anything.
            missed = frozenset(engines) & update.engines if engines else update.engines
            return _enter(*_without(state, replace(update, waiting=frozenset()), missed, why))
        case EngineFailed(engine, why):
            return _engine_failed(state, engine, why)
        case Joined(engine, version):
            return _joined(state, engine, version)
        case Left(engine):
            failed, effects = _engine_failed(state, engine, "it is gone")
            rest = {name: holds for name, holds in failed.engines.items() if name != engine}
            return replace(failed, engines=MappingProxyType(rest)), effects


def _begin(state: Versions, version: int) -> Outcome:
    if state.update is not None or version <= state.version:
        raise _out_of_order(state, Begin(version))
    members = frozenset(name for name, holds in state.engines.items() if holds is not Holds.FENCED)
    return _pause(state, Update(version, Step.PAUSE, members, members))


def _begin_catch_up(state: Versions) -> Outcome:
    if state.update is not None:
        raise _out_of_order(state, CatchUp())
    stale = frozenset(name for name, holds in state.engines.items() if holds is Holds.STALE)
    return _pause(state, Update(state.version, Step.PAUSE, stale, stale, is_catch_up=True))


def _pause(state: Versions, update: Update) -> Outcome:
    if not update.engines:
        return state, [Finished(update.version, ())]
    return replace(state, update=update), [Do(Step.PAUSE, tuple(sorted(update.engines)), update.version)]


def _step_done(state: Versions, engine: str, of_step: Step) -> Outcome:
    update = state.update
    if update is None or of_step is not update.step or of_step is Step.SEND or engine not in update.waiting:
        if state.engines.get(engine) is Holds.FENCED:
            return state, []  # it was fenced while it did so
        raise _out_of_order(state, StepDone(engine, of_step))
    waiting = update.waiting - {engine}
    holding = _with(state, engine, Holds.CURRENT) if of_step is Step.RESUME else state
    return _enter(holding, replace(update, waiting=waiting))


def _engine_failed(state: Versions, engine: str, why: str) -> Outcome:
    if state.engines.get(engine) in (None, Holds.FENCED):
        return state, []
    update = state.update
    if update is None or engine not in update.engines:
        return _with(state, engine, Holds.FENCED), [Fence(engine, why)]
    if update.step is Step.SEND:  # what the sender says of it is waited for
        left = replace(update, engines=update.engines - {engine}, waiting=update.waiting - {engine})
        return replace(_with(state, engine, Holds.FENCED), update=left), [Fence(engine, why)]
    return _enter(*_without(state, update, frozenset({engine}), why))


def _without(
    state: Versions, update: Update, missed: frozenset[str], why: str
) -> tuple[Versions, Update, list[Effect]]:
    effects: list[Effect] = []
    for engine in sorted(missed):
        state = _with(state, engine, Holds.FENCED)
        effects.append(Fence(engine, why))
    return state, replace(update, engines=update.engines - missed, waiting=update.waiting - missed), effects


def _enter(state: Versions, update: Update, effects: list[Effect] | None = None) -> Outcome:
    """Go on to the next step if nobody has to be waited for in this one."""
    effects = effects or []
    if not update.engines:
        return replace(state, update=None), [*effects, Finished(update.version, ())]
    if update.waiting:
        return replace(state, update=update), effects
    if update.step is Step.RESUME:
        done = replace(state, update=None)
        return done, [*effects, Finished(update.version, tuple(sorted(update.engines)))]
    following = _ORDER[_ORDER.index(update.step) + 1]
    entered = replace(update, step=following, waiting=update.engines)
    members = tuple(sorted(update.engines))
    if following is Step.SEND:
        # From here on nobody knows what an engine holds until it has all.
        stale = {name: Holds.STALE if name in update.engines else holds for name, holds in state.engines.items()}
        state = replace(state, engines=MappingProxyType(stale))
        return replace(state, update=entered), [*effects, Send(members, update.version)]
    if following is Step.RESUME:
        state = _committed(state, update)
    return replace(state, update=entered), [*effects, Do(following, members, update.version)]


def _committed(state: Versions, update: Update) -> Versions:
    """All engines of the update hold the version. Others that are not fenced do not, any more, if it is a new one."""
    if update.is_catch_up:
        caught_up = dict.fromkeys(update.engines, Holds.CURRENT)
        return replace(state, engines=MappingProxyType({**state.engines, **caught_up}))
    holds = {
        name: Holds.CURRENT if name in update.engines else Holds.FENCED if held is Holds.FENCED else Holds.STALE
        for name, held in state.engines.items()
    }
    return replace(state, version=update.version, engines=MappingProxyType(holds))


def _joined(state: Versions, engine: str, version: int | None) -> Outcome:
    if state.update is not None and engine in state.update.engines:
        raise _out_of_order(state, Joined(engine, version))
    # While an update is under way, what is current now will not be in a moment.
    current = version is not None and version == state.version and state.update is None
    return _with(state, engine, Holds.CURRENT if current else Holds.STALE), []


def _with(state: Versions, engine: str, holds: Holds) -> Versions:
    return replace(state, engines=MappingProxyType({**state.engines, engine: holds}))


def _sending(state: Versions, event: Event) -> Update:
    if state.update is None or state.update.step is not Step.SEND:
        raise _out_of_order(state, event)
    return state.update


def _out_of_order(state: Versions, event: Event) -> UpdateOutOfOrder:
    update = state.update
    stands = "no update" if update is None else f"update to {update.version}, step {update.step.value}"
    return UpdateOutOfOrder(
        f"weight updates: {event} cannot come now",
        evidence=f"{stands}; committed version {state.version}; waited for: {sorted(update.waiting) if update else []}",
        advice="Report it with the lines above; the run can be continued from its newest checkpoint.",
    )
