import pytest
from support.ranks import warm_process


@pytest.fixture(scope="session", autouse=True)
def ranks():
    """The warm process that ranks are forked from; see ``support.ranks``."""
    with warm_process():
        yield
