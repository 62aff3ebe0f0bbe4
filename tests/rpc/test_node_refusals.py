"""What a node does when it cannot send, or not yet."""

import asyncio

import pytest
from support.wired import virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
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


class Gate(Actor):
    """Waits on one thread, answers on another."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.num_waiting = 0

    @endpoint
    async def wait(self):
        self.num_waiting += 1
        await self.gate.wait()

    @endpoint(thread="io")
    def open(self):
        self.gate.set()
        return self.num_waiting


@virtual
async def test_a_full_window_of_one_thread_does_not_hold_up_another():
    async with wired() as net:
        mesh = net.spawn(Gate)
        waiting = [mesh.wait.call_one() for _ in range(1001)]
        await asyncio.sleep(1)
        assert await mesh.open.call_one() == 1000
        await waiting[1000]
