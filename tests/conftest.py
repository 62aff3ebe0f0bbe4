"""For all tests: a runtime directory of the session's own, and no test module leaves anything behind."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings
from support.leaks import begin_session, no_leaks

# How long an example takes says more about the machine than about the code.
settings.register_profile("miles", deadline=None)
settings.load_profile("miles")

begin_session()


@pytest.fixture(scope="session", autouse=True)
def private_runtime_directory():
    """Tests never meet the directories of real runs, nor those of another test session. Short, for sockets."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as path:
        os.environ["XDG_RUNTIME_DIR"] = path
        yield
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_behind(private_runtime_directory):
    """Descriptors, threads, processes, shared memory and runtime directories are as before the module."""
    with no_leaks():
        yield
