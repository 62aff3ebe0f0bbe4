"""Ranks for these tests come from one warm process."""

from __future__ import annotations

import pytest
from support.ranks import warm_process


@pytest.fixture(scope="session", autouse=True)
def ranks():
    with warm_process():
        yield
