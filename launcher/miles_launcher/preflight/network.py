"""Which address who would use on a host. Pure.

An agent takes the address of ``--interface``, else that on the way to the controller, and names its interface to NCCL
and gloo, unless the user has chosen others. NCCL's rule: ``NCCL_SOCKET_IFNAME`` has beginnings of names with commas
between them; ``^`` in front means all but those, ``=`` whole names. Gloo's: ``GLOO_SOCKET_IFNAME`` has whole names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from miles_agents.agent.inventory import UnknownInterface, order_addresses
from miles_launcher.preflight.facts import HostFacts

AGENT, NCCL, GLOO = "agents", "NCCL", "gloo"


def variables(facts: HostFacts, env: Mapping[str, str]) -> dict[str, str]:
    """What a rank's libraries would read: the host's, under what the run gives."""
    return {**facts.get("env", {}), **env}


def nccl_interface(interfaces: Mapping[str, list[str]], wanted: str) -> str | None:
    """The interface that NCCL would take first; None: there is none that fits."""
    excluded, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    parts = [part.partition(":")[0] for part in wanted.lstrip("^=").split(",") if part]

    def is_named(name: str) -> bool:
        return any(name == part if exact else name.startswith(part) for part in parts)

    return next((name for name in interfaces if _plain(interfaces, name) and is_named(name) != excluded), None)


def addresses(facts: HostFacts, env: Mapping[str, str], interface: str | None, *, cuda: bool) -> dict[str, str]:
    """By purpose, the address that others would have to reach. What a host lacks is left out: the judge says so."""
    interfaces = facts.get("interfaces", {})
    try:
        own = order_addresses(interfaces, interface)[:1]
    except UnknownInterface:
        own = ()
    if not interface and facts.get("reaches_by"):
        own = (facts["reaches_by"],)
    given = variables(facts, env)
    wanted = given.get("NCCL_SOCKET_IFNAME", "")
    nccl = _plain(interfaces, nccl_interface(interfaces, wanted))[:1] if wanted else own
    wanted = given.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    gloo = _plain(interfaces, wanted)[:1] if wanted else own
    found = {AGENT: own, NCCL: nccl if cuda else (), GLOO: gloo}
    return {purpose: one[0] for purpose, one in found.items() if one}


def _plain(interfaces: Mapping[str, list[str]], name: str | None) -> list[str]:
    """The addresses of an interface that are not of its link alone."""
    return [address for address in interfaces.get(name or "", ()) if _is_plain(address)]


def _is_plain(address: str) -> bool:
    return not ipaddress.ip_address(address.partition("%")[0]).is_link_local


def is_loopback(address: str) -> bool:
    """Whether nobody else reaches it."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
