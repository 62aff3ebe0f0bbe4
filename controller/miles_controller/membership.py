"""Which nodes belong to the run, which life of each is current, and when a life is over. Pure.

Consumes `Hello`, `Beat`, `LinkUp`, `LinkDown`, `Goodbye`, `Evidence`, `Tick`; produces `Welcome`, `AnswerBeat`,
`Refuse`, `Suspect`, `Recovered`, `NodeDead`, `NodeGone`. Waits for nothing itself: whoever runs it sends a `Tick` at
`next_tick`.

Invariants: an incarnation is given out once and never again, over all nodes and the whole run; each ends by at most one
of `NodeDead` and `NodeGone`, never twice, and the old one ends before the next is welcomed; `Suspect` and `Recovered`
alternate; a beat is answered only if its incarnation is current, because the answer renews the lease over there;
silence alone declares death no earlier than ``dead_s`` after a beat was *received*.

A new session of a node whose old one lives, silent or not, has to wait: until the old one is dead by time, or somebody
who can know says that it is over (``Evidence``: the launcher that saw the reaper exit, or the node's own agent, which
tells in its next HELLO which of its lives it has fenced, by session ids that nobody else knows).
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from miles_agents.node_info import NodeInfo
from miles_agents.timings import Timings

NodeState: TypeAlias = Literal["expected", "alive", "suspect", "dead", "gone"]
STORY_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Hello:
    """An agent introduces itself. A session is one life of an agent process, named by itself."""

    node: str
    session: str
    info: NodeInfo


@dataclass(frozen=True, slots=True)
class Beat:
    """The agent says that it is alive; ``id`` comes back in the answer."""

    node: str
    incarnation: int
    id: int = 0


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The connection of the node stands. No sign of life: only beats are."""

    node: str


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection of the node is gone, as far as the transport can tell. No verdict: it may come back."""

    node: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The agent ended in good order and has nothing running any more."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Somebody saw this life end (the launcher saw the process exit)."""

    node: str
    incarnation: int
    cause: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = Hello | Beat | LinkUp | LinkDown | Goodbye | Evidence | Tick


@dataclass(frozen=True, slots=True)
class Welcome:
    """The session is this incarnation of the node. Repeated for a session that says hello again."""

    node: str
    session: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class AnswerBeat:
    """Answer the beat: the lease over there is renewed."""

    node: str
    incarnation: int
    id: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell whoever sent this (a session, or a stale incarnation) that it does not belong to the run."""

    node: str
    reason: str
    session: str | None = None
    incarnation: int | None = None


@dataclass(frozen=True, slots=True)
class Suspect:
    """The node has been silent for ``silence_s``."""

    node: str
    incarnation: int
    silence_s: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """The node beats again."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class NodeDead:
    """This life is over; its ranks may be used again."""

    node: str
    incarnation: int
    cause: str


@dataclass(frozen=True, slots=True)
class NodeGone:
    """This life ended in good order."""

    node: str
    incarnation: int


Effect: TypeAlias = Welcome | AnswerBeat | Refuse | Suspect | Recovered | NodeDead | NodeGone


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of a node's history: when, what happened, what it changed (``alive -> suspect``, or empty)."""

    at: float
    event: str
    transition: str


@dataclass(slots=True)
class Member:
    """What is known of one node. ``heard_at``: when the newest hello or beat was received."""

    node: str
    state: NodeState = "expected"
    session: str | None = None
    incarnation: int | None = None
    info: NodeInfo | None = None
    heard_at: float = 0.0
    link_up: bool = False
    history: deque[Moment] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))

    @property
    def living(self) -> bool:
        """Whether its incarnation is current."""
        return self.state in ("alive", "suspect")

    def move(self, state: NodeState, event: str, now: float) -> None:
        """Enter a state and write it down."""
        self.history.append(Moment(now, event, f"{self.state} -> {state}" if state != self.state else ""))
        self.state = state


class Membership:
    """The nodes of a run, by name.

    Kept in place rather than copied on write: a beat per node and second must not copy a thousand nodes.

    Args:
        nodes: Names of the nodes that may join.
        timings: ``suspect_s`` and ``dead_s`` are used.
        number: Gives a number that nothing else ever had, as the incarnation of a life.
    """

    def __init__(self, nodes: Iterable[str], timings: Timings, *, number: Callable[[], int] | None = None) -> None:
        self.members = {node: Member(node) for node in nodes}
        self._timings = timings
        self._number = number or functools.partial(next, itertools.count(1))

    def missing(self) -> tuple[str, ...]:
        """Nodes that have never joined."""
        return tuple(member.node for member in self.members.values() if member.state == "expected")

    def next_tick(self) -> float | None:
        """When the next `Tick` has something to do; None while no node lives."""
        times = [
            member.heard_at + (self._timings.suspect_s if member.state == "alive" else self._timings.dead_s)
            for member in self.members.values()
            if member.living
        ]
        return min(times, default=None)

    def story(self, node: str) -> tuple[Moment, ...]:
        """The last events of a node that were not beats, oldest first; empty for an unknown node."""
        member = self.members.get(node)
        return tuple(member.history) if member else ()

    def describe(self, node: str, now: float) -> str:
        """The story as lines for an error message, with times as seconds before ``now``."""
        lines = [
            f"{now - moment.at:8.1f} s ago  {moment.event}" + (f"  ({moment.transition})" if moment.transition else "")
            for moment in self.story(node)
        ]
        member = self.members.get(node)
        if member and member.incarnation is not None:
            lines.append(f"{now - member.heard_at:8.1f} s ago  heard for the last time")
        return "\n".join(lines) or f"{node} never said hello"

    def step(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Apply one event at time ``now`` (seconds of any clock that does not run backwards)."""
        match event:
            case Beat():  # first, because most are
                return self._beat(event, now)
            case Hello():
                return self._hello(event, now)
            case Goodbye() | Evidence():
                return self._over(event, now)
            case LinkUp(node) | LinkDown(node):
                self._link(node, up=isinstance(event, LinkUp), now=now)
                return ()
            case Tick():
                return tuple(effect for member in self.members.values() for effect in self._tick(member, now))

    def _over(self, event: Goodbye | Evidence, now: float) -> tuple[Effect, ...]:
        member = self._current(event.node, event.incarnation)
        if member is None:
            return ()
        if isinstance(event, Evidence):
            return (self._dead(member, event.cause, now),)
        member.move("gone", "said goodbye", now)
        return (NodeGone(event.node, event.incarnation),)

    def _current(self, node: str, incarnation: int) -> Member | None:
        member = self.members.get(node)
        return member if member and member.living and member.incarnation == incarnation else None

    def _hello(self, event: Hello, now: float) -> tuple[Effect, ...]:
        member = self.members.get(event.node)
        if member is None:
            near = difflib.get_close_matches(event.node, self.members, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return (Refuse(event.node, f"no node of this run is called {event.node!r}{hint}", event.session),)
        if event.session == member.session:
            return self._hello_again(member, now)
        if member.living:
            reason = f"{event.node} is taken by an agent that was heard {now - member.heard_at:.1f} s ago"
            member.move(member.state, "turned a second agent away", now)
            return (Refuse(event.node, reason, event.session),)
        member.session, member.incarnation, member.info = event.session, self._number(), event.info
        member.heard_at, member.link_up = now, True
        member.move("alive", f"joined as incarnation {member.incarnation}", now)
        return (Welcome(event.node, event.session, member.incarnation),)

    def _hello_again(self, member: Member, now: float) -> tuple[Effect, ...]:
        if not member.living or member.incarnation is None:
            reason = f"incarnation {member.incarnation} of {member.node} is over ({member.state})"
            return (Refuse(member.node, reason, member.session, member.incarnation),)
        member.link_up = True
        recovered = self._heard(member, "said hello again", now)
        return (*recovered, Welcome(member.node, member.session or "", member.incarnation))

    def _beat(self, event: Beat, now: float) -> tuple[Effect, ...]:
        member = self._current(event.node, event.incarnation)
        if member is None:
            known = self.members.get(event.node)
            state = f"it is {known.state}, incarnation {known.incarnation}" if known else "unknown node"
            reason = f"incarnation {event.incarnation} of {event.node} is not current: {state}"
            return (Refuse(event.node, reason, incarnation=event.incarnation),)
        recovered = self._heard(member, "beats again", now)
        return (*recovered, AnswerBeat(event.node, event.incarnation, event.id))

    def _heard(self, member: Member, event: str, now: float) -> tuple[Effect, ...]:
        member.heard_at = now
        if member.state != "suspect" or member.incarnation is None:
            return ()
        member.move("alive", event, now)
        return (Recovered(member.node, member.incarnation),)

    def _link(self, node: str, *, up: bool, now: float) -> None:
        member = self.members.get(node)
        if member and member.link_up != up:
            member.link_up = up
            member.move(member.state, "link up" if up else "link down", now)

    def _tick(self, member: Member, now: float) -> tuple[Effect, ...]:
        if not member.living or member.incarnation is None:
            return ()
        silence = now - member.heard_at
        effects: list[Effect] = []
        if member.state == "alive" and now >= member.heard_at + self._timings.suspect_s:
            member.move("suspect", f"silent for {silence:.1f} s", now)
            effects.append(Suspect(member.node, member.incarnation, silence))
        if now >= member.heard_at + self._timings.dead_s:
            effects.append(self._dead(member, f"silent for {silence:.1f} s", now))
        return tuple(effects)

    def _dead(self, member: Member, cause: str, now: float) -> NodeDead:
        incarnation = member.incarnation if member.incarnation is not None else 0
        member.move("dead", cause, now)
        return NodeDead(member.node, incarnation, cause)
