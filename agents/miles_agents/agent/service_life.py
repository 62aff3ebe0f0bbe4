"""The life of a child that is watched through a health probe: a pure state machine, without I/O or clock.

* Consumes: events (what happened to the process, probe results, what owners ask, ``Tick``), each with ``now``.
* Produces: a new state and effects for the shell to carry out, in order.
* Waits for: what ``wake_at`` says. Every wait has a deadline there, but for the three phases that rest on the
  owner's word: ``paused`` and ``released`` (the exit of the process ends them too), ``fenced`` and ``dead`` without a
  process. The shell answers each ``Start`` with ``Started`` or ``StartFailed``, and each ``Kill`` (in time) with
  ``Exited``; a ``Kill`` that shows nothing is repeated without grace.
* Invariants: never two processes; no probe while paused, released, fenced or dead; restarts stay within the budget;
  ``StopAsked`` ends in ``dead`` from everywhere; a fenced life never starts again (its successor is a new life).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias


class Phase(Enum):
    """Where a service stands."""

    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"
    RELEASED = "released"
    RESUMING = "resuming"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FENCED = "fenced"
    DEAD = "dead"


class Process(Enum):
    """Whether there is a process: none, asked for, running."""

    NONE = "none"
    SPAWNING = "spawning"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class LifeNumbers:
    """Times in seconds. ``max_restarts`` counts within ``restart_window_s``; ports in use do not cost any of it.

    ``first_wait_s`` passes between ready (again) and the first probe that counts; ``starting_interval_s`` is between
    probes until then, ``again_interval_s`` after one that failed; None: as ``probe_interval_s``.
    """

    start_timeout_s: float = 600.0
    resume_timeout_s: float = 120.0
    release_timeout_s: float = 120.0
    probe_interval_s: float = 2.0
    probe_timeout_s: float = 5.0
    first_wait_s: float = 0.0
    starting_interval_s: float | None = None
    again_interval_s: float | None = None
    failures_until_unhealthy: int = 3
    max_restarts: int = 3
    restart_window_s: float = 3600.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    grace_s: float = 10.0
    kill_again_s: float = 15.0
    max_port_retries: int = 5


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of phase and its cause."""

    at: float
    before: Phase
    after: Phase
    cause: str

    def __str__(self) -> str:
        return f"{self.before.value} -> {self.after.value}: {self.cause}"


@dataclass(frozen=True, slots=True)
class Started:
    """The process of this attempt runs."""

    attempt: int
    pid: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """No process came of this attempt."""

    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process of this attempt is gone, and all that it had started."""

    attempt: int
    exit: str
    ports_in_use: bool = False


@dataclass(frozen=True, slots=True)
class ProbeOk:
    """The health probe of this attempt's process was answered as expected."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """It was not."""

    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """End for good."""

    why: str = "asked to stop"


@dataclass(frozen=True, slots=True)
class PauseAsked:
    """Do not probe: the service will not answer for a while, on purpose."""


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """Its memory is being given back; ``ReleaseDone`` follows. Not probed from here on."""


@dataclass(frozen=True, slots=True)
class ReleaseDone:
    """Its memory is given back."""


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    """Probe again; after a release, ready means that a probe was answered."""


@dataclass(frozen=True, slots=True)
class FenceAsked:
    """Make sure, without grace, that it does no more harm."""

    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = (
    Started
    | StartFailed
    | Exited
    | ProbeOk
    | ProbeFailed
    | StopAsked
    | PauseAsked
    | ReleaseAsked
    | ReleaseDone
    | ResumeAsked
    | FenceAsked
    | Tick
)


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process; with ``new_ports``, on ports other than before."""

    attempt: int
    new_ports: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the process of this attempt for its health, once."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process of this attempt and all it started: TERM, ``grace_s`` seconds, KILL."""

    attempt: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """Tell who cares."""

    transition: Transition


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It is dead against the owner's will."""

    reason: str


Effect: TypeAlias = Start | Probe | Kill | Report | GiveUp

STORY_LENGTH = 50
_PROBED = (Phase.STARTING, Phase.READY, Phase.RESUMING)


@dataclass(frozen=True, slots=True)
class Life:
    """The state. ``story`` holds the last 50 transitions, oldest first."""

    numbers: LifeNumbers
    phase: Phase = Phase.STARTING
    process: Process = Process.NONE
    pid: int | None = None
    attempt: int = 0
    probing: bool = False
    probe_at: float = 0.0
    failures: int = 0
    last_failure: str = "never probed"
    deadline: float | None = None
    pause_wanted: bool = False
    fence_wanted: bool = False
    restarts: tuple[float, ...] = ()
    port_retries: int = 0
    new_ports: bool = True
    story: tuple[Transition, ...] = field(default=())


Step: TypeAlias = tuple[Life, list[Effect]]


def begin(numbers: LifeNumbers, now: float) -> Step:
    """A new life, and its first effects."""
    return _start(Life(numbers), now)


def wake_at(state: Life) -> float | None:
    """When the next ``Tick`` is due; None in the phases that rest on the owner's word alone."""
    times = [] if state.deadline is None else [state.deadline]
    if _is_probed(state):
        times.append(state.probe_at)
    return min(times, default=None)


def step(state: Life, event: Event, now: float) -> Step:
    """What the event means. Events of earlier attempts, and those that mean nothing now, change nothing."""
    match event:
        case Tick():
            return _tick(state, now)
        case Started(attempt, pid):
            return _started(state, pid) if _is_current(state, attempt, Process.SPAWNING) else (state, [])
        case StartFailed(attempt, why):
            fits = _is_current(state, attempt, Process.SPAWNING)
            return _gone(state, f"could not start: {why}", False, now) if fits else (state, [])
        case Exited(attempt, text, ports_in_use):
            fits = _is_current(state, attempt, Process.RUNNING)
            return _gone(state, text, ports_in_use, now) if fits else (state, [])
        case ProbeOk(attempt):
            return _probe_ok(state, now) if _awaits_probe(state, attempt) else (state, [])
        case ProbeFailed(attempt, why):
            return _probe_failed(state, why, now) if _awaits_probe(state, attempt) else (state, [])
        case StopAsked() | FenceAsked():
            return _end(state, event, now)
        case _:
            return _asked(state, event, now)


def _is_current(state: Life, attempt: int, process: Process) -> bool:
    return state.attempt == attempt and state.process is process


def _is_probed(state: Life) -> bool:
    return state.phase in _PROBED and state.process is Process.RUNNING


def _awaits_probe(state: Life, attempt: int) -> bool:
    return state.probing and state.attempt == attempt and _is_probed(state)


def _move(state: Life, phase: Phase, cause: str, now: float, deadline: float | None = None) -> Step:
    """Change phase: one transition, one report. A probe that is under way counts for nothing any more."""
    transition = Transition(now, state.phase, phase, cause)
    moved = replace(
        state,
        phase=phase,
        deadline=deadline,
        probing=False,
        story=(*state.story, transition)[-STORY_LENGTH:],
    )
    return moved, [Report(transition)]


def _start(state: Life, now: float) -> Step:
    attempt = state.attempt + 1
    started = replace(
        state,
        process=Process.SPAWNING,
        attempt=attempt,
        probing=False,
        probe_at=now,
        failures=0,
        last_failure="never probed",
        deadline=now + state.numbers.start_timeout_s,
        new_ports=False,
    )
    return started, [Start(attempt, state.new_ports)]


def _started(state: Life, pid: int) -> Step:
    running = replace(state, process=Process.RUNNING, pid=pid)
    if state.phase is Phase.STARTING:
        return running, []
    # What came while it was being started (stop, fence, too late) takes effect now.
    return running, [Kill(state.attempt, _grace(state))]


def _kill(state: Life, phase: Phase, cause: str, grace_s: float, now: float) -> Step:
    moved, effects = _move(state, phase, cause, now, now + grace_s + state.numbers.kill_again_s)
    if state.process is Process.RUNNING:
        effects.append(Kill(state.attempt, grace_s))
    return moved, effects


def _tick(state: Life, now: float) -> Step:
    if state.deadline is not None and now >= state.deadline:
        return _expired(state, now)
    if not _is_probed(state) or now < state.probe_at:
        return state, []
    if state.probing:
        return _probe_failed(state, "the probe did not end", now)
    numbers = state.numbers
    # The shell ends a probe after probe_timeout_s; this deadline holds if the shell does not.
    probing = replace(state, probing=True, probe_at=now + 2 * numbers.probe_timeout_s)
    return probing, [Probe(state.attempt)]


def _expired(state: Life, now: float) -> Step:
    numbers = state.numbers
    match state.phase:
        case Phase.STARTING:
            cause = f"not ready after {numbers.start_timeout_s:g} s; last probe: {state.last_failure}"
        case Phase.RESUMING:
            cause = f"not back after {numbers.resume_timeout_s:g} s; last probe: {state.last_failure}"
        case Phase.BACKOFF:
            moved, effects = _move(state, Phase.STARTING, "restart", now)
            started, more = _start(moved, now)
            return started, [*effects, *more]
        case Phase.PAUSED:
            cause = f"did not release its memory in {numbers.release_timeout_s:g} s"
        case _:  # it was killed and is still not gone
            again = replace(state, deadline=now + numbers.kill_again_s)
            return again, [Kill(state.attempt, 0.0)] if state.process is Process.RUNNING else []
    return _kill(state, Phase.UNHEALTHY, cause, numbers.grace_s, now)


def _probe_ok(state: Life, now: float) -> Step:
    numbers = state.numbers
    well = replace(state, probing=False, failures=0, last_failure="answered", probe_at=now + numbers.probe_interval_s)
    if state.phase is Phase.READY:
        return well, []
    first = replace(well, port_retries=0, probe_at=now + max(numbers.first_wait_s, numbers.probe_interval_s))
    ready, effects = _move(first, Phase.READY, "the health probe was answered", now)
    if not ready.pause_wanted:
        return ready, effects
    paused, more = _move(ready, Phase.PAUSED, "health checks are paused", now)
    return paused, [*effects, *more]


def _probe_failed(state: Life, why: str, now: float) -> Step:
    numbers = state.numbers
    failures = state.failures + 1
    interval = numbers.again_interval_s if state.phase is Phase.READY else numbers.starting_interval_s
    probe_at = now + (numbers.probe_interval_s if interval is None else interval)
    failed = replace(state, probing=False, failures=failures, last_failure=why, probe_at=probe_at)
    # While starting and resuming silence is normal: there the deadline counts, not the number.
    if state.phase is not Phase.READY or failures < numbers.failures_until_unhealthy:
        return failed, []
    return _kill(failed, Phase.UNHEALTHY, f"{failures} health probes failed: {why}", numbers.grace_s, now)


def _gone(state: Life, text: str, ports_in_use: bool, now: float) -> Step:
    """There is no process (any more)."""
    gone = replace(state, process=Process.NONE, pid=None, probing=False)
    numbers = state.numbers
    if state.phase is Phase.FENCED:
        return replace(gone, deadline=None), []
    if state.phase is Phase.STOPPING:
        return _move(gone, Phase.DEAD, text, now)
    if state.phase is Phase.STARTING and ports_in_use and state.port_retries < numbers.max_port_retries:
        retry = replace(gone, port_retries=state.port_retries + 1, new_ports=True)
        moved, effects = _move(retry, Phase.STARTING, f"{text}; a port was in use, trying others", now)
        started, more = _start(moved, now)
        return started, [*effects, *more]
    if state.phase is Phase.UNHEALTHY:
        text = f"{state.story[-1].cause}; then {text}"
    recent = tuple(at for at in state.restarts if at > now - numbers.restart_window_s)
    if len(recent) >= numbers.max_restarts:
        used_up = f"; {len(recent)} restarts in {numbers.restart_window_s:g} s are used up"
        reason = text + (used_up if numbers.max_restarts else "")
        dead, effects = _move(gone, Phase.DEAD, reason, now)
        return dead, [*effects, GiveUp(reason)]
    wait = min(numbers.max_backoff_s, numbers.backoff_s * 2.0 ** len(recent))
    counted = replace(gone, restarts=(*recent, now), new_ports=ports_in_use)
    return _move(counted, Phase.BACKOFF, f"{text}; restart in {wait:g} s", now, now + wait)


def _end(state: Life, event: StopAsked | FenceAsked, now: float) -> Step:
    fence = isinstance(event, FenceAsked)
    if state.phase is Phase.DEAD or (fence and state.phase is Phase.FENCED):
        return state, []
    if not fence and state.phase is Phase.STOPPING:
        return state, []
    state = replace(state, fence_wanted=state.fence_wanted or fence)
    if state.process is Process.NONE:
        return _move(state, Phase.FENCED if fence else Phase.DEAD, event.why, now)
    # A stop that turns into a fence is still a stop; a fence that turns into a stop still has no grace.
    phase = Phase.STOPPING if not fence or state.phase is Phase.STOPPING else Phase.FENCED
    return _kill(state, phase, event.why, _grace(state), now)


def _grace(state: Life) -> float:
    return 0.0 if state.fence_wanted else state.numbers.grace_s


def _asked(state: Life, event: Event, now: float) -> Step:
    numbers = state.numbers
    match event, state.phase:
        case PauseAsked(), Phase.READY:
            return _move(replace(state, pause_wanted=True), Phase.PAUSED, "health checks are paused", now)
        case PauseAsked(), Phase.STARTING | Phase.RESUMING | Phase.BACKOFF | Phase.UNHEALTHY:
            return replace(state, pause_wanted=True), []
        case ReleaseAsked(), Phase.READY | Phase.PAUSED | Phase.RESUMING:
            deadline = now + numbers.release_timeout_s
            if state.phase is Phase.PAUSED:
                return replace(state, deadline=deadline), []
            return _move(state, Phase.PAUSED, "releases its memory", now, deadline)
        case ReleaseDone(), Phase.READY | Phase.PAUSED | Phase.RESUMING:
            return _move(state, Phase.RELEASED, "its memory is released", now)
        case ResumeAsked(), Phase.PAUSED:
            awake = replace(state, pause_wanted=False, failures=0, probe_at=now + numbers.first_wait_s)
            return _move(awake, Phase.READY, "health checks go on", now)
        case ResumeAsked(), Phase.RELEASED:
            awake = replace(state, pause_wanted=False, failures=0, probe_at=now, last_failure="never probed")
            return _move(awake, Phase.RESUMING, "takes its memory back", now, now + numbers.resume_timeout_s)
        case ResumeAsked(), _:
            return replace(state, pause_wanted=False), []
        case _:
            return state, []
