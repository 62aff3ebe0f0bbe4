"""For all tests: a runtime directory of the session's own, and no test module leaves anything behind."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings
from support import needs
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


LEFT_OUT = pytest.StashKey[list]()


def pytest_configure(config):
    """A place for what is left out, here and by those who run tests for us."""
    config.stash[LEFT_OUT] = []


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """What this machine cannot run is left out, unless it has to be able to."""
    items[:], left_out, out = needs.split(items, os.environ)
    config.stash[LEFT_OUT] += left_out
    if out:
        config.hook.pytest_deselected(items=out)


def pytest_sessionfinish(session):
    """A process of xdist tells the one that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """All of them tell the same, or nothing if they died."""
    told = [tuple(one) for one in getattr(node, "workeroutput", {}).get("left_out", ())]
    node.config.stash[LEFT_OUT] += told


def pytest_terminal_summary(terminalreporter, config):
    """No gap goes unseen."""
    lines = needs.report(config.stash[LEFT_OUT])
    if lines:
        terminalreporter.write_sep("=", "left out")
    for line in lines:
        terminalreporter.write_line(line)
