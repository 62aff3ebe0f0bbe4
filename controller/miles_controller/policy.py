"""What happens when a rank of a mesh dies or hangs. Pure.

Consumes `RankStarted`, `RankDied`, `RespawnFailed`, `RankFrozen`, `RankThawed`, `Tick`; produces `KillRank`,
`RespawnRank`, `FailMesh`, `ReportHung`. Waits for nothing itself; whoever runs it sends a `Tick` at
`Supervision.next_tick`.

Invariants: each ``(rank, incarnation)`` is acted on once: one `KillRank`, one `ReportHung`, and its death counts
once; a rank is respawned only after its last life ended; `FailMesh` comes once, and after it only kills of ranks that
were on their way back; with ``kill_group`` it comes when no rank is left. Whoever runs it owes a `RankDied` for each
`KillRank`, and a `RankStarted` or `RespawnFailed` for each `RespawnRank` that a `FailMesh` did not make void.

Budgets: ranks restarted alone have a budget each (the loss of a node with eight ranks is one restart of each, not
eight of one budget); a group restarted as a whole has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from miles_agents.errors import ConfigError

Decision: TypeAlias = Literal["fail", "restart", "restart_group", "kill_group", "handled"]
"""``handled``: the rank stays dead and the mesh goes on without it."""


class InvalidPolicy(ConfigError):
    """A supervision policy makes no sense."""

    code = "E-POLICY-001"


@dataclass(frozen=True, slots=True)
class Death:
    """One death, as callable policies see it.

    Attributes:
        restarts: Restarts that count against the budget now.
        causes: The deaths before it, oldest first, as text.
    """

    rank: int
    incarnation: int
    cause: str
    now: float
    restarts: int
    causes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """How to react.

    Attributes:
        on_death: ``fail``: the mesh failed, its owner decides. ``restart``: the rank comes back alone.
            ``kill_group``: the survivors are killed (only that frees them from a collective), then the mesh failed.
            Or a function that decides for each death; one that raises fails the mesh.
        whole_group: With ``restart``: kill the survivors and bring all ranks back together.
        max_restarts: Budget within ``window_s`` seconds; the death after it fails the mesh.
        backoff_s: Wait before the first restart; doubles with each restart in the window, up to ``backoff_cap_s``.
        hang_timeout_s: A rank frozen for so long is killed; None: it is only reported.
        stopped_timeout_s: A rank whose process was stopped (SIGSTOP) for so long is killed by its agent, which looks
            at it with every beat; None: it is only reported. One that a debugger holds (ptrace) is not meant.

    Raises:
        InvalidPolicy: With all that is wrong.
    """

    on_death: Literal["fail", "restart", "kill_group"] | Callable[[Death], Decision] = "fail"
    max_restarts: int = 3
    window_s: float = 600.0
    backoff_s: float = 1.0
    backoff_cap_s: float = 30.0
    hang_timeout_s: float | None = None
    stopped_timeout_s: float | None = None
    whole_group: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not callable(self.on_death) and self.on_death not in ("fail", "restart", "kill_group"):
            problems.append(f"on_death={self.on_death!r} is none of fail, restart, kill_group, or a function")
        if self.whole_group and self.on_death != "restart":
            problems.append("whole_group needs on_death='restart'")
        if self.max_restarts < 0:
            problems.append(f"max_restarts={self.max_restarts} is below 0")
        if self.window_s <= 0:
            problems.append(f"window_s={self.window_s} is not positive")
        if not 0 <= self.backoff_s <= self.backoff_cap_s:
            problems.append(f"backoff_s={self.backoff_s} is not between 0 and backoff_cap_s={self.backoff_cap_s}")
        if self.hang_timeout_s is not None and self.hang_timeout_s <= 0:
            problems.append(f"hang_timeout_s={self.hang_timeout_s} is not positive")
        if self.stopped_timeout_s is not None and self.stopped_timeout_s <= 0:
            problems.append(f"stopped_timeout_s={self.stopped_timeout_s} is not positive")
        if problems:
            raise InvalidPolicy(
                "a supervision policy makes no sense",
                evidence="; ".join(problems),
                advice="Correct the values above.",
            )

    def backoff(self, restarts: int) -> float:
        """Seconds to wait before a restart, after so many in the window."""
        return min(self.backoff_cap_s, self.backoff_s * 2.0 ** min(restarts, 60))


@dataclass(frozen=True, slots=True)
class RankStarted:
    """A respawned rank lives, as this incarnation."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class RankDied:
    """A life of a rank ended."""

    rank: int
    incarnation: int
    cause: str


@dataclass(frozen=True, slots=True)
class RespawnFailed:
    """A rank could not be brought back. Counts like a death."""

    rank: int
    cause: str


@dataclass(frozen=True, slots=True)
class RankFrozen:
    """A rank has made no progress since ``since``."""

    rank: int
    incarnation: int
    since: float
    evidence: str


@dataclass(frozen=True, slots=True)
class RankThawed:
    """A frozen rank makes progress again."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = RankStarted | RankDied | RespawnFailed | RankFrozen | RankThawed | Tick


@dataclass(frozen=True, slots=True)
class KillRank:
    """Kill this life of the rank; a `RankDied` must follow."""

    rank: int
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class RespawnRank:
    """Start the rank again, not before ``at``."""

    rank: int
    at: float


@dataclass(frozen=True, slots=True)
class FailMesh:
    """The mesh is over; tell its owner. Respawns that have not begun are void."""

    reason: str
    causes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReportHung:
    """Show that the rank hangs, with its evidence (stack)."""

    rank: int
    incarnation: int
    since: float
    evidence: str


Effect: TypeAlias = KillRank | RespawnRank | FailMesh | ReportHung


@dataclass(frozen=True, slots=True)
class RankLife:
    """The current life of one rank. ``dying``: killed by us, its death is awaited."""

    incarnation: int
    status: Literal["alive", "dying", "dead", "restarting"] = "alive"
    frozen: RankFrozen | None = None
    hang_reported: bool = False
    killed_as: Literal["", "group", "hung"] = ""


@dataclass(frozen=True, slots=True)
class Supervision:
    """State of one mesh; copied on write.

    Attributes:
        restarts: Times of the restarts that still count: by rank, or under -1 for the group.
        causes: The deaths that were not asked for, as text; the newest `MAX_CAUSES` of them.
        reason: Why the mesh fails, once it is clear that it does.
    """

    policy: Policy
    ranks: Mapping[int, RankLife]
    phase: Literal["running", "killing", "regrouping", "failed"] = "running"
    restarts: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    causes: tuple[str, ...] = ()
    reason: str = ""

    @classmethod
    def start(cls, policy: Policy, incarnations: Mapping[int, int]) -> Supervision:
        """A mesh all of whose ranks live: ``{rank: incarnation}``."""
        return cls(policy, {rank: RankLife(incarnation) for rank, incarnation in incarnations.items()})

    def next_tick(self) -> float | None:
        """When the next `Tick` has something to do."""
        if self.policy.hang_timeout_s is None or self.phase != "running":
            return None
        timeout = self.policy.hang_timeout_s
        times = [life.frozen.since + timeout for life in self.ranks.values() if life.frozen and life.status == "alive"]
        return min(times, default=None)


_GROUP = -1
MAX_CAUSES = 64
Step: TypeAlias = tuple[Supervision, tuple[Effect, ...]]


def step(state: Supervision, event: Event, now: float) -> Step:
    """Apply one event at time ``now``. Events of ranks and incarnations that are not current change nothing."""
    result: Step = (state, ())
    match event:
        case RankStarted(rank, incarnation):
            result = _started(state, rank, incarnation)
        case RankDied(rank, incarnation, cause):
            life = state.ranks.get(rank)
            if life is not None and life.incarnation == incarnation and life.status in ("alive", "dying"):
                result = _died(state, rank, cause, now)
        case RespawnFailed(rank, cause):
            if rank in state.ranks and state.ranks[rank].status == "restarting":
                result = _died(state, rank, f"respawn failed: {cause}", now)
        case RankFrozen(rank, incarnation) if _alive(state, rank, incarnation):
            result = _frozen(state, event, now)
        case RankThawed(rank, incarnation) if _alive(state, rank, incarnation):
            result = (_change(state, rank, frozen=None), ())
        case Tick():
            result = _kill_hung(state, now)
    return result


def _alive(state: Supervision, rank: int, incarnation: int) -> bool:
    life = state.ranks.get(rank)
    return life is not None and (life.incarnation, life.status) == (incarnation, "alive")


def _change(state: Supervision, rank: int, **changes: object) -> Supervision:
    return _change_all(state, (rank,), **changes)


def _change_all(state: Supervision, ranks: Iterable[int], **changes: object) -> Supervision:
    """One copy for all of them: a mesh may have thousands."""
    changed = {rank: replace(state.ranks[rank], **changes) for rank in ranks}  # type: ignore[arg-type]
    return replace(state, ranks={**state.ranks, **changed})


def _started(state: Supervision, rank: int, incarnation: int) -> Step:
    life = state.ranks.get(rank)
    if life is None or incarnation <= life.incarnation:
        return state, ()
    state = replace(state, ranks={**state.ranks, rank: RankLife(incarnation)})
    if state.phase == "running":
        return state, ()
    # It was under way when the others were sent away.
    reason = state.reason or "its group is being restarted"
    return _change(state, rank, status="dying", killed_as="group"), (KillRank(rank, incarnation, reason),)


def _died(state: Supervision, rank: int, cause: str, now: float) -> Step:
    life = state.ranks[rank]
    if life.killed_as == "hung" and life.frozen is not None:
        since = now - life.frozen.since
        cause = f"killed because it hung for {since:.1f} s ({life.frozen.evidence}); {cause}"
    text = f"rank {rank} (incarnation {life.incarnation}): {cause}"
    state = _change(state, rank, status="dead", frozen=None)
    if state.phase == "failed":
        return state, ()
    if life.killed_as != "group":
        state = replace(state, causes=(*state.causes, text)[-MAX_CAUSES:])
    if state.phase != "running":
        return _when_all_dead(state, now)
    decision, state = _decide(state, rank, cause, now)
    return _carry_out(state, decision, rank, text, now)


def _carry_out(state: Supervision, decision: Decision, rank: int, text: str, now: float) -> Step:
    key = _GROUP if decision == "restart_group" else rank
    left = len(_recent(state, key, now)) < state.policy.max_restarts
    used_up = f"{state.policy.max_restarts} restarts within {state.policy.window_s:g} s are used up; last: {text}"
    result: Step = (state, ())
    match decision:
        case "restart" if left:
            result = _respawn(state, (rank,), key, now)
        case "restart":
            result = _fail(replace(state, reason=used_up))
        case "restart_group" if left:
            result = _kill_rest(replace(state, phase="regrouping"), f"restarting the group: {text}", now)
        case "restart_group":
            result = _kill_rest(replace(state, phase="killing", reason=used_up), used_up, now)
        case "kill_group":
            result = _kill_rest(replace(state, phase="killing", reason=f"first to die: {text}"), f"died: {text}", now)
        case "fail":
            result = _fail(replace(state, reason=state.reason or text))
    return result


def _decide(state: Supervision, rank: int, cause: str, now: float) -> tuple[Decision, Supervision]:
    policy = state.policy
    if not callable(policy.on_death):
        if policy.on_death == "restart" and policy.whole_group:
            return "restart_group", state
        return policy.on_death, state
    restarts = max(len(_recent(state, rank, now)), len(_recent(state, _GROUP, now)))
    death = Death(rank, state.ranks[rank].incarnation, cause, now, restarts, state.causes[:-1])
    try:
        decision = policy.on_death(death)
    except Exception as error:  # noqa: BLE001  boundary: a user's function may raise anything
        return "fail", replace(state, reason=f"the policy function raised {error!r} for rank {rank}: {cause}")
    if decision not in get_args(Decision):
        return "fail", replace(state, reason=f"the policy function returned {decision!r} for rank {rank}: {cause}")
    return decision, state


def _recent(state: Supervision, key: int, now: float) -> tuple[float, ...]:
    return tuple(at for at in state.restarts.get(key, ()) if now - at < state.policy.window_s)


def _respawn(state: Supervision, ranks: tuple[int, ...], key: int, now: float) -> Step:
    recent = _recent(state, key, now)
    state = replace(state, restarts={**state.restarts, key: (*recent, now)})
    state = _change_all(state, ranks, status="restarting", killed_as="")
    at = now + state.policy.backoff(len(recent))
    return state, tuple(RespawnRank(rank, at) for rank in ranks)


def _kill_rest(state: Supervision, reason: str, now: float) -> Step:
    alive = {rank: life for rank, life in state.ranks.items() if life.status == "alive"}
    state = _change_all(state, alive, status="dying", killed_as="group")
    kills = [KillRank(rank, life.incarnation, reason) for rank, life in alive.items()]
    state, effects = _when_all_dead(state, now)
    return state, (*kills, *effects)


def _when_all_dead(state: Supervision, now: float) -> Step:
    if any(life.status != "dead" for life in state.ranks.values()):
        return state, ()
    if state.phase == "regrouping":
        return _respawn(replace(state, phase="running"), tuple(state.ranks), _GROUP, now)
    return _fail(state)


def _fail(state: Supervision) -> Step:
    return replace(state, phase="failed"), (FailMesh(state.reason, state.causes),)


def _frozen(state: Supervision, event: RankFrozen, now: float) -> Step:
    life = state.ranks[event.rank]
    first = life.frozen.since if life.frozen else event.since
    frozen = replace(event, since=min(first, event.since))
    state = _change(state, event.rank, frozen=frozen, hang_reported=True)
    report = () if life.hang_reported else (ReportHung(event.rank, event.incarnation, event.since, event.evidence),)
    state, kills = _kill_hung(state, now)
    return state, (*report, *kills)


def _kill_hung(state: Supervision, now: float) -> Step:
    timeout = state.policy.hang_timeout_s
    if timeout is None or state.phase != "running":
        return state, ()
    hung = {
        rank: KillRank(rank, life.incarnation, f"hung: {life.frozen.evidence}")
        for rank, life in state.ranks.items()
        if life.frozen and life.status == "alive" and now >= life.frozen.since + timeout
    }
    return _change_all(state, hung, status="dying", killed_as="hung"), tuple(hung.values())
