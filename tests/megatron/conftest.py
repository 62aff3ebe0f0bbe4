"""Ranks come from one warm process for all tests of this directory."""

import pytest
from support.ranks import warm_process


@pytest.fixture(scope="session", autouse=True)
def ranks():
    with warm_process():
        yield
