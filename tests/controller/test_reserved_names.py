"""What a handle has itself cannot be an endpoint: the call would never leave the process."""

import pytest

from miles_agents import endpoint
from miles_agents.rpc.actor import RESERVED_NAMES, BadEndpoint
from miles_controller.owned_mesh import OwnedMesh


def test_all_names_of_handles_are_reserved_and_no_others():
    assert {name for name in dir(OwnedMesh) if not name.startswith("_")} == RESERVED_NAMES


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "_hidden", "__stack__"])
def test_an_endpoint_of_such_a_name_is_refused_where_it_is_written(name):
    def method(self): ...

    method.__name__ = name
    with pytest.raises(BadEndpoint, match=f"cannot be called {name}") as caught:
        endpoint(method)
    assert "wait_failed" in caught.value.evidence


def test_verbs_are_not_reserved():
    def call(self): ...

    assert endpoint(call) is call
