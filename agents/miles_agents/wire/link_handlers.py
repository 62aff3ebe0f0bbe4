"""What a link says to the code above it, and how it stays alive when that code, or a peer, is wrong."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from miles_agents.wire.envelope import Envelope, MalformedFrame

if TYPE_CHECKING:
    from miles_agents.wire.peer import Peer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Refusal:
    """Why a HELLO is turned away. ``final``: trying again is of no use."""

    reason: str
    final: bool = True


@dataclass(slots=True)
class Admission:
    """A HELLO is accepted: the peer's name here and what WELCOME tells it."""

    name: str
    grant: dict[str, Any] = field(default_factory=dict)


class LinkHandler(Protocol):
    """What lies above a link. What its methods raise is counted and logged, and changes nothing else here."""

    def on_envelope(self, peer: Peer, envelope: Envelope) -> None:
        """The next envelope of the peer."""

    def on_peer_up(self, peer: Peer, *, resumed: bool) -> None:
        """The peer is connected; ``resumed`` if its session went on. Also without an ``on_peer_down`` before it."""

    def on_peer_down(self, peer: Peer) -> None:
        """The connection is gone; a hint, not a verdict."""

    def on_beat(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        """A dialer's beat came (acceptor); returns the facts for the answer. No answer is sent if this raises."""

    def on_answer(self, peer: Peer, beat_id: int, facts: dict[str, Any]) -> None:
        """An acceptor's answer came (dialer)."""

    def on_goodbye(self, peer: Peer, reason: str) -> None:
        """The peer leaves in good order."""


class AcceptorHandler(LinkHandler, Protocol):
    """What lies above a link that accepts."""

    def admit(self, hello: dict[str, Any], user_id: str, session_id: int) -> Admission | Refusal:
        """Judge a HELLO whose session is not known here."""


class DialerHandler(LinkHandler, Protocol):
    """What lies above a link that dials."""

    def on_welcome(self, grant: dict[str, Any]) -> None:
        """The first WELCOME of the session."""

    def on_refused(self, refusal: Refusal) -> None:
        """The acceptor does not want this session (any more)."""


_MAX_REASONS = 100
_MAX_REASON_CHARS = 200


@dataclass(slots=True)
class LinkStats:
    """What was dropped, by reason. Bounded, because peers have a say in the words of the reasons."""

    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> int:
        """Count one; returns how many there are of it. Reasons beyond the first 100 share ``other``."""
        key = reason[:_MAX_REASON_CHARS]
        if key not in self.dropped and len(self.dropped) >= _MAX_REASONS:
            key = "other"
        count = self.dropped.get(key, 0) + 1
        self.dropped[key] = count
        return count


class Boundary:
    """The border to the code above and to the transport below: what is raised inside is counted and logged."""

    __slots__ = ("_stats", "_what")

    def __init__(self, stats: LinkStats, what: str) -> None:
        self._stats = stats
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.caught(error)
        return True

    def caught(self, error: Exception) -> None:
        """Count and log what was raised, where a context would cost too much: on every message's way."""
        if isinstance(error, MalformedFrame):
            self._stats.drop(error.evidence)
            return
        count = self._stats.drop(f"{self._what} raised {type(error).__name__}")
        # A fault that repeats with every message must not fill the log: the 1st, 2nd, 4th, 8th... is written.
        if count & (count - 1) == 0:
            logger.error("%s raised, %d times so far", self._what, count, exc_info=error)
