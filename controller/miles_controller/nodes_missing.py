"""The errors for nodes that do not come, or of which nobody knows."""

from __future__ import annotations

from collections.abc import Sequence

from miles_agents.errors import EnvironmentFault
from miles_controller.fabric import Fabric
from miles_controller.services import NoSuchNode


class NodesMissing(EnvironmentFault):
    """Agents of some nodes have not joined in time."""

    code = "E-NODE-002"


def refuse_unknown(fabric: Fabric, names: Sequence[str]) -> None:
    """Nodes of whom nobody told the run cannot join, so waiting for them is in vain. Raises NoSuchNode."""
    unknown = [name for name in names if name not in fabric.membership.members]
    if unknown:
        raise NoSuchNode(
            f"the run expects no node {', '.join(map(repr, unknown))}",
            evidence=f"nodes that may join: {', '.join(fabric.membership.members) or 'none'}",
            advice="Check the name, or give it in ControllerConfig(nodes=...) or with issue_key.",
        )


def nodes_missing(fabric: Fabric, wanted: Sequence[str], timeout_s: float) -> NodesMissing:
    """Names the missing, and what was turned away meanwhile."""
    missing = [name for name in wanted if fabric.find(name) is None]
    transport = fabric.link.transport.stats
    refused = [f"{reason} ({count}x)" for reason, count in {**transport.reasons, **fabric.link.stats.dropped}.items()]
    return NodesMissing(
        f"{len(missing)} of {len(wanted)} nodes have not joined within {timeout_s:g} s: {', '.join(missing)}",
        evidence=f"joined: {', '.join(name for name in wanted if name not in missing) or 'none'}; "
        f"turned away: {'; '.join(refused) or 'nobody'}",
        advice="Look at the agents' output on those nodes; check that they can reach the controller's address.",
    )
