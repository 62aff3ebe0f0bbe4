"""Errors about workers, as their agent words them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_agents.agent.logs import last_words
from miles_agents.agent.worker_life import Dead
from miles_agents.errors import MilesError, PeerFault

if TYPE_CHECKING:
    from miles_agents.agent.worker_pool import Worker


class WorkerNeverReady(PeerFault):
    """A worker ended, or was ended, before it said hello."""

    code = "E-PEER-006"


def advice_on(cause: str) -> str:
    """What to do about a death of this cause."""
    if "out of memory" in cause:
        return "Give the node more memory or the rank less work; the kernel ended it for want of memory."
    if "SIGKILL" in cause:
        return "Find out who sent SIGKILL (an operator, the kernel's OOM killer: see dmesg)."
    return "Read its last lines and its log file."


def never_ready(worker: Worker, death: Dead, tail: list[str]) -> WorkerNeverReady:
    """It ended before it said hello."""
    return WorkerNeverReady(
        f"{worker.spec.label}, pid {worker.life.pid}, never said hello: {death.cause}",
        evidence=f"its last lines ({worker.log_path}):\n{last_words(tail)}",
        advice="Read its last lines; an import that fails or a wrong interpreter shows there.",
        actor=worker.spec.label,
        pid=worker.life.pid,
        exit=death.cause,
    )


def given_up(worker: Worker) -> WorkerNeverReady:
    """It was ended before it was executed."""
    return WorkerNeverReady(
        f"{worker.spec.label} never said hello: it was ended before it was executed",
        evidence=worker.life.why_stopped,
        advice="Give it more time with start_timeout_s if it had too little; look at the load of the node.",
        actor=worker.spec.label,
    )


def still_there(worker: Worker) -> MilesError:
    """Another life of the rank has not gone."""
    return PeerFault(
        f"{worker.spec.label} runs here already, as incarnation {worker.spec.incarnation}",
        evidence=f"state {worker.life.state}, pid {worker.life.pid}",
        advice="End it first.",
    )
