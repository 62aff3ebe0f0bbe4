"""Where the controller listens for nodes that no ssh leads to."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from miles_agents.agent.inventory import address_towards, interface_addresses, order_addresses
from miles_launcher import ssh_nodes
from miles_launcher.ssh_start import Ssh


def bind_address(given: str | None, peers: Sequence[str]) -> str:
    """``tcp://ADDRESS:PORT``, port 0 for a free one.

    Args:
        given: ``--controller-host``: an address or name of this machine, perhaps with a port.
        peers: Names of the nodes: if none is given, it is this machine's address on the way to the first whose name is
            known, else its first one.

    Raises:
        NoCommonAddress: ``given`` leads nowhere on this machine.
    """
    if given is not None:
        return ssh_nodes.bind_address(given, (), Ssh())
    for peer in peers:
        address = address_towards(f"tcp://{peer}:9")
        if address and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return _tcp(address)
    return _tcp(order_addresses(interface_addresses(), None)[0])


def _tcp(address: str) -> str:
    return f"tcp://[{address}]:0" if ":" in address else f"tcp://{address}:0"
