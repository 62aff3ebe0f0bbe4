"""The life of one worker as its agent sees it. Pure.

    starting --Started--> greeting --Greeted--> up <--> silent
        \\_____________________\\_________________\\______\\--Exited--> dead

Consumes what the process table, the link and the clock report. Produces ``Report``s, each once: ``Ready``,
``Silent``/``Heard``, ``Dead``; and ``Kill`` when the start takes too long. A beat that does not come never kills:
it is reported with what the kernel says of the process, and policy decides (DESIGN: liveness).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

State = Literal["starting", "greeting", "up", "silent", "stopping", "dead"]
_STOPPED = frozenset({"T", "t"})


@dataclass(frozen=True, slots=True)
class Started:
    """The process executes."""

    pid: int


@dataclass(frozen=True, slots=True)
class Greeted:
    """The worker said HELLO with its token."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A beat or message of the worker came. As an effect: it had been silent and is not any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; ``process_state`` is the letter of /proc/pid/stat, None if the process is gone."""

    process_state: str | None


@dataclass(frozen=True, slots=True)
class StopAsked:
    """It is being ended on purpose."""

    why: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone."""

    how: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker takes messages."""


@dataclass(frozen=True, slots=True)
class Silent:
    """No sign of life for ``silence_s``, and what is known of why."""

    silence_s: float
    evidence: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End it now."""

    why: str


@dataclass(frozen=True, slots=True)
class Dead:
    """The worker is gone. ``expected``: it was asked to end."""

    cause: str
    expected: bool
    was_ready: bool


Event: TypeAlias = Started | Greeted | Heard | Tick | StopAsked | Exited
Effect: TypeAlias = Ready | Silent | Heard | Kill | Dead


@dataclass(frozen=True, slots=True)
class WorkerLife:
    """What is known. ``heard_at``: loop time of the last sign of life."""

    start_deadline: float
    stopped_s: float
    suspect_s: float
    heard_at: float
    state: State = "starting"
    pid: int = 0
    was_ready: bool = False
    why_stopped: str = ""


def begin(now: float, *, start_timeout_s: float, beat_s: float, suspect_s: float) -> WorkerLife:
    """A worker about to be started. A stopped process is reported after two beats, a mute one at ``suspect_s``."""
    return WorkerLife(now + start_timeout_s, min(2 * beat_s, suspect_s), suspect_s, now)


def step(life: WorkerLife, event: Event, now: float) -> tuple[WorkerLife, tuple[Effect, ...]]:
    """Apply one event."""
    if life.state == "dead":
        return life, ()
    match event:
        case Exited(how):
            return _exited(life, how)
        case StopAsked(why):
            return replace(life, state="stopping", why_stopped=life.why_stopped or why), ()
        case Started(pid):
            state: State = "greeting" if life.state == "starting" else life.state
            return replace(life, pid=pid, state=state), ()
        case Greeted() if life.state in ("starting", "greeting"):
            return replace(life, state="up", heard_at=now, was_ready=True), (Ready(),)
        case Greeted() | Heard():
            return _heard(life, now)
        case Tick(process_state):
            return _tick(life, process_state, now)


def _exited(life: WorkerLife, how: str) -> tuple[WorkerLife, tuple[Effect, ...]]:
    expected = life.state == "stopping"
    cause = f"{how}; it was ended because {life.why_stopped}" if expected else how
    return replace(life, state="dead"), (Dead(cause, expected, life.was_ready),)


def _heard(life: WorkerLife, now: float) -> tuple[WorkerLife, tuple[Effect, ...]]:
    if life.state == "silent":
        return replace(life, state="up", heard_at=now), (Heard(),)
    return replace(life, heard_at=now), ()


def _tick(life: WorkerLife, process_state: str | None, now: float) -> tuple[WorkerLife, tuple[Effect, ...]]:
    if life.state in ("starting", "greeting"):
        if now < life.start_deadline:
            return life, ()
        why = f"it did not say hello in time (state {life.state}, process state {process_state})"
        return replace(life, state="stopping", why_stopped=why), (Kill(why),)
    silence_s = now - life.heard_at
    if life.state != "up" or silence_s < life.stopped_s:
        return life, ()
    if process_state in _STOPPED:
        evidence = "the process is stopped (SIGSTOP or a debugger)"
    elif silence_s < life.suspect_s:
        return life, ()
    else:
        evidence = (
            f"process state {process_state}: its interpreter does not run other threads, or the machine is starved"
        )
    return replace(life, state="silent"), (Silent(silence_s, evidence),)
