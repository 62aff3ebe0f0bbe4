"""One remote host from the start of its ssh to its end. Pure.

Consumes what its ssh prints and how it ends, that the controller welcomed its node, the end of the copying of code.
Produces effects for whoever runs it. Waits for nothing itself.

What proves the end of what runs there is the agent's goodbye, which the controller hears, and its reaper's word
(``SaidClean``). The end of ssh proves nothing: it closes the agent's stdin, which ends nothing as long as the agent has
its link to the controller. So

    waiting -> starting (-> copying -> starting) -> joining -> joined -> link lost
    before joined -> failed; from joined on -> gone

Invariants: one of ``TellJoined`` and ``Failed`` is told at most once; a host in an end state produces no effect;
``ReportClean`` is produced at most once, and only after the reaper said so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, TypeAlias


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
    """rsync has ended."""

    well: bool = True


@dataclass(frozen=True, slots=True)
class SaidReady:
    """Python, packages and code are as they have to be; the agent starts, below the reaper of this pid."""

    reaper: int


@dataclass(frozen=True, slots=True)
class SaidFailed:
    """The host cannot be used, as it found itself."""


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """The controller has welcomed its agent."""


@dataclass(frozen=True, slots=True)
class SaidClean:
    """The reaper ended, and nothing that its agent started is left."""


@dataclass(frozen=True, slots=True)
class SshEnded:
    """The local ssh has ended."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Whoever starts it has no more time, or ends everything."""


Event: TypeAlias = (
    StartAsked | WantsCode | CodeCopied | SaidReady | SaidFailed | NodeJoined | SaidClean | SshEnded | GivenUp
)


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start ssh."""


@dataclass(frozen=True, slots=True)
class CopyCode:
    """Run rsync into this directory of the host."""

    directory: str


@dataclass(frozen=True, slots=True)
class SayGo:
    """Tell the host that the code is there."""


@dataclass(frozen=True, slots=True)
class SendKey:
    """Write the key: the host is as it has to be. Watch for its node."""


@dataclass(frozen=True, slots=True)
class TellJoined:
    """It can be used."""


Cause: TypeAlias = Literal["host", "copy", "ssh", "given up"]


@dataclass(frozen=True, slots=True)
class Failed:
    """It cannot. ``cause``: who knows why: the host said it, rsync did, it is in how ssh ended, or nobody waits."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class ReportClean:
    """Tell the controller that nothing is left of what this reaper's agent started."""

    reaper: int


@dataclass(frozen=True, slots=True)
class TellLinkLost:
    """Tell people that ssh has ended; the run goes on."""


Effect: TypeAlias = Spawn | CopyCode | SayGo | SendKey | TellJoined | Failed | ReportClean | TellLinkLost


@dataclass(frozen=True, slots=True)
class HostLife:
    """The state. ``reaper``: its pid on the host, 0 before it is known. ``clean``: it has given its word."""

    phase: Phase = Phase.WAITING
    reaper: int = 0
    clean: bool = False


def step(host: HostLife, event: Event) -> tuple[HostLife, tuple[Effect, ...]]:
    """Apply one event."""
    if host.phase in ENDS:
        return host, ()
    match event:
        case SaidFailed():
            return _end(host, "host")
        case GivenUp():
            return _end(host, "given up")
        case SaidClean() if host.reaper and not host.clean:
            return replace(host, clean=True), (ReportClean(host.reaper),)
        case SshEnded() if host.phase in IN_RUN and not host.clean:
            return replace(host, phase=Phase.LINK_LOST), (TellLinkLost(),) if host.phase is Phase.JOINED else ()
        case SshEnded():
            return _end(host, "ssh")
    return _forward(host, event)


def _forward(host: HostLife, event: Event) -> tuple[HostLife, tuple[Effect, ...]]:
    """The way into the run; what comes out of order changes nothing."""
    match host.phase, event:
        case Phase.WAITING, StartAsked():
            return replace(host, phase=Phase.STARTING), (Spawn(),)
        case Phase.STARTING, WantsCode(directory):
            return replace(host, phase=Phase.COPYING), (CopyCode(directory),)
        case Phase.COPYING, CodeCopied(well):
            return (replace(host, phase=Phase.STARTING), (SayGo(),)) if well else _end(host, "copy")
        case Phase.STARTING, SaidReady(reaper):
            return replace(host, phase=Phase.JOINING, reaper=reaper), (SendKey(),)
        case Phase.JOINING, NodeJoined():
            return replace(host, phase=Phase.JOINED), (TellJoined(),)
    return host, ()


def _end(host: HostLife, cause: Cause) -> tuple[HostLife, tuple[Effect, ...]]:
    if host.phase in IN_RUN:
        return replace(host, phase=Phase.GONE), ()
    return replace(host, phase=Phase.FAILED), (Failed(cause),)
