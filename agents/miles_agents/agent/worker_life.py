"""The life of one worker as its agent sees it. Pure.

    starting --Started--> greeting --Greeted--> up <--> silent
        \\_____________________\\_________________\\______\\--Exited--> dead

Consumes what the process table, the link and the clock report. Produces ``Report``s, each once: ``Ready``,
``Silent``/``Heard``, ``Dead``; and ``Kill`` when the start takes too long. A beat that does not come never kills:
it is reported with what the kernel says of the process, and policy decides (DESIGN: liveness).

One thing the kernel knows better than any beat: a process in state T (SIGSTOP) does nothing until somebody continues
it. One that every look found so, for as long as its mesh allows (``stopped_timeout_s``), is killed, which is a death
that nobody asked for. Not counted are: state t, in which a debugger that is attached has it; a sign of life, or another
state, in between; the time between two looks that are far apart, because then the agent itself did not run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

State = Literal["starting", "greeting", "up", "silent", "stopping", "dead"]
_STOPPED = {
    "T": "the process is stopped (SIGSTOP)",
    "t": "the process is stopped by a debugger that is attached to it",
}


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
    """No sign of life for ``silence_s``, and what is known of why. Told again if that changes."""

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
    """What is known.

    Attributes:
        heard_at: Loop time of the last sign of life.
        stopped_timeout_s: A process that is stopped for so long is killed; None: it is only reported.
        looked_at: When its process was looked at last.
        stopped_since: The first of the looks since which it was stopped each time.
        told_stop: What was reported of a stop.
    """

    start_deadline: float
    stopped_s: float
    suspect_s: float
    heard_at: float
    state: State = "starting"
    pid: int = 0
    was_ready: bool = False
    why_stopped: str = ""
    is_fenced: bool = False
    stopped_timeout_s: float | None = None
    looked_at: float = -math.inf
    stopped_since: float | None = None
    told_stop: str = ""


def begin(
    now: float, *, start_timeout_s: float, beat_s: float, suspect_s: float, stopped_timeout_s: float | None = None
) -> WorkerLife:
    """A worker about to be started. A stopped process is reported after two beats, a mute one at ``suspect_s``."""
    mute_s = min(2 * beat_s, suspect_s)
    return WorkerLife(now + start_timeout_s, mute_s, suspect_s, now, stopped_timeout_s=stopped_timeout_s)


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
    return replace(life, state="dead"), (Dead(cause, expected and not life.is_fenced, life.was_ready),)


def _heard(life: WorkerLife, now: float) -> tuple[WorkerLife, tuple[Effect, ...]]:
    life = replace(life, heard_at=now, stopped_since=None)
    if life.state == "silent":
        return replace(life, state="up"), (Heard(),)
    return life, ()


def _tick(life: WorkerLife, process_state: str | None, now: float) -> tuple[WorkerLife, tuple[Effect, ...]]:
    if life.state in ("starting", "greeting"):
        if now < life.start_deadline:
            return life, ()
        why = f"it did not say hello in time (state {life.state}, process state {process_state})"
        return replace(life, state="stopping", why_stopped=why), (Kill(why),)
    if life.state not in ("up", "silent"):
        return life, ()
    life = _looked(life, process_state, now)
    if life.stopped_since is not None and life.stopped_timeout_s is not None:
        stopped_s = now - life.stopped_since
        if stopped_s >= life.stopped_timeout_s:
            why = f"its process was stopped (SIGSTOP) for {stopped_s:.0f} s"
            return replace(life, state="stopping", why_stopped=why, is_fenced=True), (Kill(why),)
    return _judge_silence(life, process_state, now)


def _looked(life: WorkerLife, process_state: str | None, now: float) -> WorkerLife:
    since = None
    if process_state == "T":
        goes_on = life.stopped_since is not None and now - life.looked_at <= life.suspect_s
        since = life.stopped_since if goes_on else now
    return replace(life, looked_at=now, stopped_since=since)


def _judge_silence(life: WorkerLife, process_state: str | None, now: float) -> tuple[WorkerLife, tuple[Effect, ...]]:
    silence_s = now - life.heard_at
    stop = _STOPPED.get(process_state or "", "")
    if life.state == "silent":
        is_news = stop != life.told_stop
    else:
        is_news = silence_s >= (life.stopped_s if stop else life.suspect_s)
    if not is_news:
        return life, ()
    running = f"process state {process_state}: its interpreter does not run other threads, or the machine is starved"
    return replace(life, state="silent", told_stop=stop), (Silent(silence_s, stop or running),)
