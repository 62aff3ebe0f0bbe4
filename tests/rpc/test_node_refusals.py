"""What a node does when it cannot send, or not yet."""

import asyncio

import pytest
from support.wired import virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.errors import WrongVerb
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Shape
from miles_agents.wire.codec import encode
from miles_agents.wire.envelope import CONTROLLER_MESH, REPLY, Address
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

    @endpoint
    async def items(self):
        yield 1

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


@virtual
async def test_an_answer_of_another_mesh_with_the_same_rank_and_incarnation_is_no_answer():
    sent = []
    node = RpcNode(Address(CONTROLLER_MESH, 0, 1), "caller", sent.append)
    call = ActorMesh(MeshInfo(7, "far", {0: 5}), Shape.of(ranks=1), node).anything.call_one()
    (request,) = sent
    for mesh, what in ((8, "forged"), (7, "true")):
        body, _ = encode(what)
        node.deliver(request.answer(REPLY, Address(mesh, 0, 5), body))
    assert await call == "true"
    assert node.calls.stats.late == 1


@virtual
async def test_a_stream_that_is_awaited_says_how_to_read_it():
    async with wired() as net:
        mesh = net.spawn(Gate)
        with pytest.raises(WrongVerb, match="items was awaited") as refused:
            await mesh.items.call_one()
        assert "async for" in refused.value.advice
        assert [item async for item in mesh.items.call_one()] == [1]
