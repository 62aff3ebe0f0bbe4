"""Why an agent does not get to work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_agents.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from miles_agents.agent.agent import Agent


class AgentRefused(ConfigError):
    """The controller knows the key but does not take the node."""

    code = "E-AGENT-001"

    @classmethod
    def because(cls, agent: Agent, reason: str) -> AgentRefused:
        """For this agent."""
        return cls(
            f"the controller at {agent.link.transport.address} refuses node {agent.parts.info.node!r}",
            evidence=reason,
            advice="Start one agent per node name, with a key that was issued for this run and this name.",
        )


class ControllerUnreachable(EnvironmentFault):
    """Nobody answers at the controller's address, or not with the right key."""

    code = "E-AGENT-002"

    @classmethod
    def because(cls, agent: Agent, reason: str) -> ControllerUnreachable:
        """For this agent."""
        transport = agent.link.transport
        seen = ", ".join(f"{why} ({count}x)" for why, count in transport.stats.reasons.items())
        return cls(
            f"node {agent.parts.info.node!r} cannot join the run of the controller at {transport.address}",
            evidence=f"{reason}; handshakes that failed: {seen or 'none, so nothing answers there'}",
            advice="Check address, firewall, and that the key was issued by this very controller.",
        )
