"""The agent process, as far as it can be looked at without starting one."""

import resource
from dataclasses import replace

import pytest

from miles_agents.agent.main import _port_leases, raise_file_limit
from miles_agents.agent.ports import UnknownInterface
from miles_agents.simulation import simulated_info


def test_ports_are_free_on_the_chosen_interface_and_it_has_to_be_of_this_host():
    elsewhere = replace(simulated_info("node-0"), addresses=("192.0.2.1", "127.0.0.1"))
    with pytest.raises(UnknownInterface, match=r"192\.0\.2\.1"):
        _port_leases(elsewhere, "eth7")
    _port_leases(elsewhere, None).close()
    _port_leases(simulated_info("node-0"), "lo").close()


def test_the_agent_may_open_as_many_files_as_are_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, allowed), hard))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
