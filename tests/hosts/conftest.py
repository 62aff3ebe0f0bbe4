"""Hosts are up for as long as a module's tests run; each finds all links as they should be."""

import pytest
from support.netns import network


@pytest.fixture(scope="module")
def hosts():
    with network() as found:
        yield found


@pytest.fixture
def net(hosts):
    hosts.restore()
    yield hosts
    hosts.restore()
