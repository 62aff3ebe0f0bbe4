"""Errors of weight updates. No torch: the controller needs these classes to tell which engines to fence."""

from __future__ import annotations

from miles_agents.errors import ConfigError, PeerFault


class EnginesMissedUpdate(PeerFault):
    """Some engines did not take an update. ``fields["engines"]`` names them; the others did."""

    code = "E-WUP-001"


class GroupNotMade(PeerFault):
    """Trainer and engines could not make the process group through which weights are broadcast."""

    code = "E-WUP-002"


class BadUpdate(ConfigError):
    """An update was asked for in a way that cannot work."""

    code = "E-WUP-003"
