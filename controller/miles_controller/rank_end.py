"""The end of a rank, confirmed: by its agent, by its death before, or by the death of its node."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from miles_agents.errors import EnvironmentFault, MilesError
from miles_agents.rpc.errors import NodeLost, StaleHandle
from miles_controller.fabric import Fabric

logger = logging.getLogger(__name__)
_ORDER_S = 60.0


class NotEnded(EnvironmentFault):
    """Ranks were told to end, and nobody could confirm that they did. Field: ranks."""

    code = "E-MESH-003"


async def end_ranks(
    fabric: Fabric, node_name: str, mesh: int, lives: Mapping[int, int], why: str, *, grace_s: float
) -> dict[int, str]:
    """Returns when nothing of these lives of ranks (rank to incarnation) on a node runs; names those of which that is
    not confirmed, with the reason."""
    node = fabric.find(node_name)
    if node is None:
        return {}
    agent = fabric.agent(node).options(timeout_s=grace_s + _ORDER_S)
    order = [[rank, incarnation] for rank, incarnation in lives.items()]
    try:
        told = await agent.endpoint("end_workers").call_one(mesh, order, why, grace_s)
    except (NodeLost, StaleHandle) as error:  # the whole node is gone
        logger.debug("%s: %s", node_name, error.what)
        return {}
    except Exception as error:  # noqa: BLE001  boundary: whatever it is, nothing is confirmed
        return dict.fromkeys(lives, describe(error))
    return {rank: text for rank, text in zip(lives, told, strict=True) if text}


def not_ended(name: str, reasons: Mapping[int, str], nodes: Mapping[int, str]) -> NotEnded:
    """The error for ranks of mesh ``name`` that may live on."""
    ranks = ", ".join(f"{name}[{rank}] on {nodes[rank]}" for rank in sorted(reasons))
    told = (f"{name}[{rank}]: {reason}" for rank, reason in sorted(reasons.items()))
    return NotEnded(
        f"not confirmed to have ended: {ranks}",
        evidence="\n".join(told),
        advice="Look at those processes on their nodes and stop the mesh again; until then it keeps its name and "
        "their devices.",
        ranks=sorted(reasons),
    )


def describe(error: Exception) -> str:
    """An error in short: what the runtime said, or the error itself."""
    if not isinstance(error, MilesError):
        return repr(error)
    return f"{error.what} ({error.evidence})" if error.evidence else error.what
