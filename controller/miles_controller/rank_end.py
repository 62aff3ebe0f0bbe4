"""The end of a rank, confirmed: by its agent, by its death before, or by the death of its node."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from miles_agents.errors import EnvironmentFault, MilesError
from miles_agents.rpc.errors import NodeLost, NoSuchActor, StaleHandle, WorkerDied
from miles_agents.wire.envelope import Address
from miles_controller.fabric import Fabric

logger = logging.getLogger(__name__)
_ORDER_S = 60.0
_GONE = (WorkerDied, NodeLost, StaleHandle, NoSuchActor)


class NotEnded(EnvironmentFault):
    """Ranks were told to end, and nobody could confirm that they did. Field: ranks."""

    code = "E-MESH-003"


async def end_rank(fabric: Fabric, node_name: str, rank: Address, why: str, *, grace_s: float) -> None:
    """Returns when nothing of this life of a rank runs. Raises what else its agent says, or that it is silent."""
    node = fabric.find(node_name)
    if node is None:
        return
    agent = fabric.agent(node).options(timeout_s=grace_s + _ORDER_S)
    try:
        await agent.endpoint("end_worker").call_one(rank.mesh, rank.rank, rank.incarnation, why, grace_s)
    except _GONE as error:  # it is dead already, or its whole node is
        logger.debug("%s: %s", rank, error.what)


def not_ended(name: str, errors: Mapping[int, Exception], nodes: Mapping[int, str]) -> NotEnded:
    """The error for ranks of mesh ``name`` that may live on."""
    ranks = ", ".join(f"{name}[{rank}] on {nodes[rank]}" for rank in sorted(errors))
    told = (f"{name}[{rank}]: {describe(error)}" for rank, error in sorted(errors.items()))
    return NotEnded(
        f"not confirmed to have ended: {ranks}",
        evidence="\n".join(told),
        advice="Look at those processes on their nodes and stop the mesh again; until then it keeps its name and "
        "their devices.",
        ranks=sorted(errors),
    )


def describe(error: Exception) -> str:
    """An error in short: what the runtime said, or the error itself."""
    if not isinstance(error, MilesError):
        return repr(error)
    return f"{error.what} ({error.evidence})" if error.evidence else error.what
