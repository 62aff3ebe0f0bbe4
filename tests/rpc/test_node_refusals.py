"""What a node does when it cannot even send."""

import pytest
from support.wired import virtual

from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Shape
from miles_agents.wire.envelope import CONTROLLER_MESH, Address
from miles_agents.wire.frames import UnsendableMessage


@virtual
async def test_a_call_that_no_peer_would_take_fails_at_once():
    def refuse(envelope):
        raise UnsendableMessage("too long", evidence="it", advice="shorten it")

    node = RpcNode(Address(CONTROLLER_MESH, 0, 1), "caller", refuse)
    mesh = ActorMesh(MeshInfo(7, "far", {0: 1}), Shape.of(ranks=1), node)
    with pytest.raises(UnsendableMessage, match="too long"):
        await mesh.anything.call_one()
    assert len(node.calls) == 0
