"""Errors of weight updates. No torch: the controller needs these classes to tell which engines to fence."""

from __future__ import annotations

from collections.abc import Mapping

from miles.backends.weight_update.messages import WeightUpdate
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


def not_made(update: WeightUpdate, failures: Mapping[str, str], why: str) -> GroupNotMade:
    """``failures``: what engines said, by name; ``why``: what the trainer's side found."""
    names = ", ".join(engine.name for engine in update.engines)
    said = [f"{name}: {text}" for name, text in failures.items()]
    return GroupNotMade(
        f"no process group of the trainer and {names} came about",
        evidence="\n".join([*([f"trainer: {why}"] if why else []), *said]) or "no reason was given",
        advice="Read the logs of the engines; a firewall between the nodes, or an interface that the other side cannot "
        "reach (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), is the usual cause.",
        engines=[engine.name for engine in update.engines],
    )
