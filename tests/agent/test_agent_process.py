"""The agent process, as far as it can be looked at without starting one."""

from dataclasses import replace

import pytest

from miles_agents.agent.main import _port_leases
from miles_agents.agent.ports import UnknownInterface
from miles_agents.simulation import simulated_info


def test_ports_are_free_on_the_chosen_interface_and_it_has_to_be_of_this_host():
    elsewhere = replace(simulated_info("node-0"), addresses=("192.0.2.1", "127.0.0.1"))
    with pytest.raises(UnknownInterface, match=r"192\.0\.2\.1"):
        _port_leases(elsewhere, "eth7")
    _port_leases(elsewhere, None).close()
    _port_leases(simulated_info("node-0"), "lo").close()
