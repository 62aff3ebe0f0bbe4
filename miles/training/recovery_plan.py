"""What a recovery does: when a part is started anew, from which checkpoint, with which batches. Pure.

``step`` is the life of one part of the job (the trainer's ranks together, or the rollout manager)::

    up --Died--> down --Wanted--> rebuilding --Rebuilt--> up
                                   |   '--Died--> rebuilding (again, later)
                                   '--Broke--> lost

* Consumes: deaths, the wish to use the part, the ends of attempts to start it anew. Produces: ``Begin``, ``GiveUp``.
* Invariants: at most one attempt is under way; a budget bounds attempts (``Policy``: so many in a window, the first at
  once, later ones with growing waits); an attempt that ends by anything but a death is the last: what user code or a
  wrong file did would happen again. ``eager`` parts are wanted at once; others when they are used next, because the
  memory that they need belongs to somebody else until then.

``plan_replay`` says how a group of ranks that begins anew becomes what it was: the newest complete checkpoint, and the
batches that were trained after it, in their order. ``is_checkpoint_due`` bounds how many these are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from miles_agents.errors import PeerFault
from miles_controller import Policy

Phase: TypeAlias = Literal["up", "down", "rebuilding", "lost"]


class RecoveryGivenUp(PeerFault):
    """A part of the job died more often than its budget of restarts allows, or cannot be brought back to its state."""

    code = "E-REC-001"


@dataclass(frozen=True, slots=True)
class Died:
    """The part, or an attempt to start it anew, ended by the death of a process."""

    cause: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody is about to use the part."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The attempt came to its end: the part is what it was."""


@dataclass(frozen=True, slots=True)
class Broke:
    """The attempt ended by an error that is no death."""


Event: TypeAlias = Died | Wanted | Rebuilt | Broke


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the part anew, not before ``at``."""

    at: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The budget is used up."""

    causes: tuple[str, ...]


Effect: TypeAlias = Begin | GiveUp


@dataclass(frozen=True, slots=True)
class Life:
    """State of one part. ``attempts``: when those of the window began; ``causes``: deaths in it, oldest first."""

    policy: Policy
    eager: bool = True
    phase: Phase = "up"
    attempts: tuple[float, ...] = ()
    causes: tuple[str, ...] = ()


def step(life: Life, event: Event, now: float) -> tuple[Life, Effect | None]:
    """Apply one event at time ``now``. What cannot be in this phase changes nothing."""
    match event, life.phase:
        case Died(cause), "up":
            life = replace(life, phase="down", causes=(*life.causes, cause))
            return _begin(life, now) if life.eager else (life, None)
        case Wanted(), "down":
            return _begin(life, now)
        case Died(cause), "rebuilding":
            return _begin(replace(life, causes=(*life.causes, cause)), now)
        case Rebuilt(), "rebuilding":
            return replace(life, phase="up"), None
        case Broke(), "rebuilding":
            return replace(life, phase="lost"), None
    return life, None


def _begin(life: Life, now: float) -> tuple[Life, Effect]:
    recent = tuple(at for at in life.attempts if now - at < life.policy.window_s)
    causes = life.causes[-(len(recent) + 1) :]
    if len(recent) >= life.policy.max_restarts:
        return replace(life, phase="lost", attempts=recent, causes=causes), GiveUp(causes)
    wait_s = life.policy.backoff(len(recent) - 1) if recent else 0.0
    return replace(life, phase="rebuilding", attempts=(*recent, now), causes=causes), Begin(now + wait_s)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete one: the state after this rollout, below ``root`` (and the critic's below ``critic_root``)."""

    root: str
    critic_root: str
    rollout_id: int

    def flags(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the config with which ranks begin from it."""
        complete = not config.get("debug_disable_optimizer")
        return {
            "load": self.root,
            "ckpt_step": self.rollout_id,
            "critic_load": self.critic_root,
            "critic_ckpt_step": self.rollout_id,
            "finetune": False,
            **({"no_load_optim": False, "no_load_rng": False} if complete else {}),
        }


@dataclass(frozen=True, slots=True)
class Replay:
    """``checkpoint``: None: as the run began. ``rollouts``: train on the batches of these, in this order."""

    checkpoint: Checkpoint | None
    rollouts: tuple[int, ...] = field(default=())


def plan_replay(newest: Checkpoint | None, *, start: int, trained: int, kept: Collection[int]) -> Replay:
    """How fresh ranks come to the state after rollout ``trained``.

    Args:
        newest: The newest complete checkpoint of this run; None: there is none yet.
        start: The run's first rollout.
        trained: The last one whose training has ended; ``start - 1``: none has.
        kept: Rollouts whose batches the journal has.

    Raises:
        RecoveryGivenUp: The journal lacks one.
    """
    first = start if newest is None else newest.rollout_id + 1
    wanted = range(first, trained + 1)
    if missing := [rollout_id for rollout_id in wanted if rollout_id not in kept]:
        raise RecoveryGivenUp(
            f"the trainer cannot be brought to the state after rollout {trained}",
            evidence=f"no batches are kept of rollouts {missing}; the newest checkpoint is "
            f"{'none' if newest is None else f'that of rollout {newest.rollout_id}'}",
            advice="Somebody removed files of the run directory; start again from the newest checkpoint.",
        )
    return Replay(newest, tuple(wanted))


def is_checkpoint_due(num_batches: int, num_bytes: int, *, max_batches: int, max_bytes: int) -> bool:
    """Whether the journal has become so long that a checkpoint should take its place."""
    return num_batches >= max_batches or (num_batches > 0 and num_bytes >= max_bytes)


def judge_heartbeats(
    misses: Mapping[int, int], answered: Mapping[int, bool], threshold: int
) -> tuple[dict[int, int], list[int]]:
    """Count the heartbeats that each rank left out in a row.

    Args:
        misses: By rank, up to now.
        answered: By rank, whether it answered this time.
        threshold: So many in a row are a hang.

    Returns:
        The new counts, and the ranks that hang.
    """
    counts = {rank: 0 if answer else misses.get(rank, 0) + 1 for rank, answer in answered.items()}
    return counts, [rank for rank, count in counts.items() if count >= threshold]
