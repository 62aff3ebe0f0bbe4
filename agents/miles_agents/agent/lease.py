"""The lease under which an agent (from its controller) or a worker (from its agent) may go on working. Pure.

Consumes `BeatSent`, `BeatAnswered`, `Tick`, and the lifeline's `StdinClosed`, `LinkUp`, `LinkDown`, `Goodbye`; produces
`Suspect`, `Recovered` (in turn) and `Fence` (once, then nothing more). Waits for nothing itself: whoever runs it
sends a `Tick` at `Lease.next_tick` at the latest.

Why it is safe: a beat that was answered was received after it was sent. The lease runs ``fence_s`` from the *sending*,
the verdict of the other side ``dead_s`` from the *receiving*; with ``fence_s < dead_s`` the holder has fenced first,
whichever direction of the link died. The first beat is the greeting: start the lease at the time that it was sent.

Two kinds:

* ``strict`` (agents): time is time. If the process was suspended and the lease is over when it wakes, it fences,
  whatever answers lie unread: others may have its ranks by now.
* ``observed`` (workers): only time during which this process really ran counts. Where two events are more than
  ``suspend_gap_s`` apart, the excess does not count. A worker whose thread was starved (a long collective, a debugger,
  a frozen process) must not take its own deafness for its agent's silence. The bound above does not hold for it; the
  agent, which kills it by pid, stands behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from miles_agents.errors import ConfigError


class InvalidLease(ConfigError):
    """The numbers of a lease contradict each other."""

    code = "E-LEASE-001"


@dataclass(frozen=True, slots=True)
class BeatSent:
    """A beat with this number left."""

    id: int


@dataclass(frozen=True, slots=True)
class BeatAnswered:
    """The beat with this number was answered. Answers to unknown or older beats change nothing."""

    id: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class StdinClosed:
    """The launcher's end of stdin is gone."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The connection stands."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection is gone, as far as the transport can tell."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The other side ends the run in good order."""


Event: TypeAlias = BeatSent | BeatAnswered | Tick | StdinClosed | LinkUp | LinkDown | Goodbye


@dataclass(frozen=True, slots=True)
class Suspect:
    """No answer for ``silence_s``; nothing is to be done yet but to say so."""

    silence_s: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """Answers come again."""


@dataclass(frozen=True, slots=True)
class Fence:
    """Kill everything now. ``orderly``: with grace, because the other side said goodbye."""

    reason: str
    orderly: bool = False


Effect: TypeAlias = Suspect | Recovered | Fence


@dataclass(slots=True)
class Lease:
    """A lease and what it remembers; changed in place, because every beat of every process passes here. Times inside
    are counted time: clock time less what did not count.

    Attributes:
        fence_s: The lease lasts so long from the sending of the last beat that was answered.
        suspect_s: Silence worth telling.
        kind: See the module.
        suspend_gap_s: Longest gap between two events that counts in full; for ``observed`` only.
        renewed_at: When the newest answered beat was sent.
        seen_at: Clock time of the last event.
        skipped_s: Clock time that did not count.
        sent: Beats under way: number to time of sending, oldest first.
    """

    fence_s: float
    suspect_s: float
    renewed_at: float
    seen_at: float
    kind: Literal["strict", "observed"] = "strict"
    suspend_gap_s: float = 2.0
    skipped_s: float = 0.0
    sent: dict[int, float] = field(default_factory=dict)
    suspect: bool = False
    link_up: bool = True
    stdin_open: bool = True
    fenced: Fence | None = None

    @classmethod
    def start(
        cls,
        now: float,
        *,
        fence_s: float,
        suspect_s: float,
        kind: Literal["strict", "observed"] = "strict",
        suspend_gap_s: float = 2.0,
        link_up: bool = True,
    ) -> Lease:
        """A fresh lease. ``now`` is when the greeting that was answered had been sent.

        Raises:
            InvalidLease: Not ``0 < suspect_s < fence_s``, or ``suspend_gap_s`` is not positive.
        """
        if not 0 < suspect_s < fence_s or suspend_gap_s <= 0:
            raise InvalidLease(
                f"lease with suspect_s={suspect_s} fence_s={fence_s} suspend_gap_s={suspend_gap_s}",
                evidence="it would end before anybody could suspect anything",
                advice="Keep 0 < suspect_s < fence_s and suspend_gap_s > 0.",
            )
        return cls(fence_s, suspect_s, now, now, kind, suspend_gap_s, link_up=link_up)

    @property
    def next_tick(self) -> float:
        """Clock time of the next `Tick`, at the latest: something is due then, or (``observed``) life must be shown."""
        due = self.ends_at if self.suspect else self.suspect_at
        return due if self.kind == "strict" else min(due, self.seen_at + self.suspend_gap_s / 2)

    @property
    def suspect_at(self) -> float:
        """Clock time at which the silence is worth telling if nothing else happens."""
        return self.renewed_at + self.suspect_s + self.skipped_s

    @property
    def ends_at(self) -> float:
        """Clock time at which the lease is over if nothing else happens."""
        return self.renewed_at + self.fence_s + self.skipped_s


def step(lease: Lease, event: Event, now: float) -> tuple[Effect, ...]:
    """Apply one event at clock time ``now``; the lease changes."""
    if lease.fenced is not None:
        return ()
    _observe(lease, now)
    counted = now - lease.skipped_s
    if isinstance(event, Goodbye):
        return _fence(lease, "the other side said goodbye", orderly=True)
    # Before the event: an answer that was read only after the lease was over is too late.
    if now >= lease.ends_at:
        return _fence(lease, f"no beat was answered for {counted - lease.renewed_at:.1f} s")
    _apply(lease, event, counted)
    if not lease.stdin_open and not lease.link_up:
        return _fence(lease, "stdin was closed and the link is down: the launcher and the controller are gone")
    return _judge(lease, now)


def _observe(lease: Lease, now: float) -> None:
    """Note that this process ran at ``now``, and how much of the time before does not count."""
    gap = now - lease.seen_at
    if lease.kind == "observed" and gap > lease.suspend_gap_s:
        lease.skipped_s += gap - lease.suspend_gap_s
    lease.seen_at = max(now, lease.seen_at)


def _apply(lease: Lease, event: Event, counted: float) -> None:
    match event:
        case BeatSent(number):
            lease.sent[number] = counted
        case BeatAnswered(number) if number in lease.sent:
            lease.renewed_at = max(lease.renewed_at, lease.sent[number])
            # Older beats can renew nothing any more, so what is kept stays bounded by one lease.
            for other in [other for other, at in lease.sent.items() if at <= lease.renewed_at]:
                del lease.sent[other]
        case LinkUp():
            lease.link_up = True
        case LinkDown():
            lease.link_up = False
        case StdinClosed():
            lease.stdin_open = False


def _judge(lease: Lease, now: float) -> tuple[Effect, ...]:
    # The very times that are published, so that a tick at them never finds itself a rounding too early.
    silent = now >= lease.suspect_at
    if silent == lease.suspect:
        return ()
    lease.suspect = silent
    return (Suspect(now - lease.skipped_s - lease.renewed_at) if silent else Recovered(),)


def _fence(lease: Lease, reason: str, *, orderly: bool = False) -> tuple[Effect, ...]:
    lease.fenced = Fence(reason, orderly)
    lease.sent.clear()
    return (lease.fenced,)
