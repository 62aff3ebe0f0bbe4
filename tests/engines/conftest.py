"""The engine of the session: see ``support.engines``."""

import pytest
import torch.distributed as dist
from support.engines import engine_model, is_wanted, real_engine
from tqdm import tqdm


@pytest.fixture(scope="session", autouse=True)
def _what_libraries_keep():
    """torch's libuv makes one pipe per process, with the first store, and keeps it; tqdm a semaphore."""
    dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    tqdm.monitor_interval = 0  # else a thread, too
    tqdm.get_lock()


@pytest.fixture(scope="session", autouse=True)
def _warm_engine_if_wanted(private_runtime_directory, request):
    """Before any module here begins, so that no module's leak check sees it come."""
    if not is_wanted(request.session, "warm_engine"):
        yield None
        return
    with real_engine(engine_model()) as engine:
        yield engine


@pytest.fixture(scope="session")
def warm_engine(_warm_engine_if_wanted):
    """A real engine that is there for all tests: leave it generating, with the weights of ``engine_model``."""
    return _warm_engine_if_wanted


def pytest_collection_modifyitems(items):
    """Engines take half a minute to start, and several where the machine is busy."""
    for item in items:
        if item.get_closest_marker("full") and "/engines/" in str(item.path):
            item.add_marker(pytest.mark.timeout(600))
