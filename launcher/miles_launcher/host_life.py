"""One remote host from the start of its ssh to its end. Pure.

Consumes what its ssh prints and how it ends, what the controller says of its node, the end of the copying of code, time.
Produces effects for whoever runs it. Waits for nothing itself.

What counts as the end of what runs there: the agent's goodbye (``NodeGone``), its reaper's word (``SaidClean``), the
controller's verdict (``NodeGone``, too). The end of ssh is none: it closes the agent's stdin, which ends nothing as long
as the agent has its link to the controller. So

    waiting -> starting -> (copying ->) joining -> joined <-> link lost
    any of them -> gone | failed

Invariants: ``Joined`` is told at most once, ``Failed`` at most once, and never after it; a host in an end state produces
no effect; ``ReportClean`` is produced only after the reaper said so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias


class Phase(Enum):
    """Where a host is in its life."""

    WAITING = "waiting for its turn"
    STARTING = "waiting for ssh and Python"
    COPYING = "copying the code"
    JOINING = "waiting for its agent to join"
    JOINED = "in the run"
    LINK_LOST = "in the run; its ssh has ended"
    GONE = "gone"
    FAILED = "failed"


ENDS = frozenset({Phase.GONE, Phase.FAILED})
IN_RUN = frozenset({Phase.JOINED, Phase.LINK_LOST})


@dataclass(frozen=True, slots=True)
class StartAsked:
    """It is its turn."""


@dataclass(frozen=True, slots=True)
class WantsCode:
    """The host has made a directory for the code, and waits."""

    directory: str


@dataclass(frozen=True, slots=True)
class CodeCopied:
    """rsync has ended. ``error``: why it could not be copied."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class SaidReady:
    """Python, packages and code are as they have to be; the agent starts, below the reaper of this pid."""

    reaper: int


@dataclass(frozen=True, slots=True)
class SaidFailed:
    """The host cannot be used, for a reason that it found itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """The controller has welcomed its agent."""


@dataclass(frozen=True, slots=True)
class NodeGone:
    """The controller knows that the node has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class SaidClean:
    """The reaper ended, and nothing that its agent started is left."""


@dataclass(frozen=True, slots=True)
class SshEnded:
    """The local ssh has ended. ``story``: how, and what it wrote last."""

    story: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Whoever starts it has no more time, or ends everything."""

    reason: str


Event: TypeAlias = (
    StartAsked
    | WantsCode
    | CodeCopied
    | SaidReady
    | SaidFailed
    | NodeJoined
    | NodeGone
    | SaidClean
    | SshEnded
    | GivenUp
)


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start ssh."""


@dataclass(frozen=True, slots=True)
class CopyCode:
    """Run rsync into this directory of the host."""

    directory: str


@dataclass(frozen=True, slots=True)
class SendKey:
    """Write the key: the host is as it has to be."""


@dataclass(frozen=True, slots=True)
class TellJoined:
    """It can be used."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It cannot. ``by_host``: the host said so itself; else it is what ssh's end looks like."""

    reason: str
    by_host: bool


@dataclass(frozen=True, slots=True)
class ReportClean:
    """Tell the controller that nothing is left of what this reaper's agent started."""

    reaper: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """Tell people that ssh has ended; the run goes on."""

    story: str


Effect: TypeAlias = Spawn | CopyCode | SendKey | TellJoined | Failed | ReportClean | LinkLost


@dataclass(frozen=True, slots=True)
class HostLife:
    """The state. ``reaper``: its pid on the host, 0 before it is known. ``clean``: it has said its word."""

    phase: Phase = Phase.WAITING
    reaper: int = 0
    clean: bool = False
    reason: str = ""


def step(host: HostLife, event: Event) -> tuple[HostLife, tuple[Effect, ...]]:
    """Apply one event."""
    if host.phase in ENDS:
        return host, ()
    match event:
        case SaidFailed(reason):
            return _failed(host, reason, by_host=True)
        case GivenUp(reason):
            return _failed(host, reason, by_host=False) if host.phase not in IN_RUN else _gone(host, reason)
        case NodeGone(reason):
            return _gone(host, reason) if host.phase in IN_RUN else (host, ())
        case SaidClean() if host.reaper and not host.clean:
            return replace(host, clean=True), (ReportClean(host.reaper),)
        case SshEnded(story):
            return _ssh_ended(host, story)
    return _forward(host, event)


def _forward(host: HostLife, event: Event) -> tuple[HostLife, tuple[Effect, ...]]:
    """The way into the run; what comes out of order changes nothing."""
    match host.phase, event:
        case Phase.WAITING, StartAsked():
            return replace(host, phase=Phase.STARTING), (Spawn(),)
        case Phase.STARTING, WantsCode(directory):
            return replace(host, phase=Phase.COPYING), (CopyCode(directory),)
        case Phase.COPYING, CodeCopied(error):
            if error:
                return _failed(host, error, by_host=True)
            return replace(host, phase=Phase.STARTING), ()
        case Phase.STARTING, SaidReady(reaper):
            return replace(host, phase=Phase.JOINING, reaper=reaper), (SendKey(),)
        case Phase.JOINING, NodeJoined():
            return replace(host, phase=Phase.JOINED), (TellJoined(),)
    return host, ()


def _ssh_ended(host: HostLife, story: str) -> tuple[HostLife, tuple[Effect, ...]]:
    if host.phase is Phase.JOINED:
        if host.clean:
            return _gone(host, story)
        return replace(host, phase=Phase.LINK_LOST), (LinkLost(story),)
    if host.phase is Phase.LINK_LOST:
        return host, ()
    return _failed(host, story, by_host=False)


def _failed(host: HostLife, reason: str, *, by_host: bool) -> tuple[HostLife, tuple[Effect, ...]]:
    if host.phase in IN_RUN:
        return _gone(host, reason)
    return replace(host, phase=Phase.FAILED, reason=reason), (Failed(reason, by_host),)


def _gone(host: HostLife, reason: str) -> tuple[HostLife, tuple[Effect, ...]]:
    return replace(host, phase=Phase.GONE, reason=reason), ()
