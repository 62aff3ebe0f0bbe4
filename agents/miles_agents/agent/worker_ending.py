"""The end of workers: what became of an order to end one, and the waits for it.

Waits for: burials and kills, each bounded by its own deadlines (``process_kill``); what cannot be killed ends the wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles_agents.errors import PeerFault

if TYPE_CHECKING:
    from miles_agents.agent.worker_pool import Worker

BURIAL_S = 30.0
"""From the end of a kill to the end of the burial: the last words, and one more look at what it left (20 s)."""
_LOOK_S = 1.0


class WorkerWouldNotDie(PeerFault):
    """Something that had to be ended still runs."""

    code = "E-PEER-007"

    @classmethod
    def because(cls, what: str, survivors: Sequence[str]) -> WorkerWouldNotDie:
        """``survivors``: pid and state of each."""
        return cls(
            what,
            evidence="\n".join(survivors),
            advice="State D waits in the kernel (a driver, a network disk) and ends when that answers; if it does not, "
            "reboot the node. Until then its devices and memory are not free.",
            survivors=list(survivors),
        )


async def wait_gone(worker: Worker) -> str:
    """Until nothing of a worker runs any more; returns how it ended.

    Raises:
        WorkerWouldNotDie: it was killed, and something still runs.
    """
    while not worker.gone.done():
        ending = worker.ending
        if ending is None or ending.done():
            if worker.left:
                break
            await asyncio.wait([worker.gone])
        else:  # which a later order with less grace may replace
            waits: set[asyncio.Future[Any]] = {worker.gone, ending}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if worker.left:
        raise WorkerWouldNotDie.because(f"{worker.spec.label} was killed, but not all of it ended", worker.left)
    return worker.gone.result()


async def wait_all(workers: Sequence[Worker]) -> list[str]:
    """Until all of them, which were told to end, are gone or known to be unkillable; returns what still runs."""
    while living := [worker for worker in workers if not _is_settled(worker)]:
        await asyncio.wait([worker.gone for worker in living], timeout=_LOOK_S)
    return [f"{worker.spec.label}: {line}" for worker in workers for line in _left_of(worker)]


def _is_settled(worker: Worker) -> bool:
    if worker.gone.done():
        return True
    if worker.ending is None or not worker.ending.done():
        return False
    return bool(worker.left) or asyncio.get_running_loop().time() > worker.killed_at + BURIAL_S


def _left_of(worker: Worker) -> tuple[str, ...]:
    if worker.left or worker.gone.done():
        return worker.left
    state = worker.process.state() if worker.process is not None else None
    return (f"pid {worker.life.pid}, state {state}: its end was not seen",)
