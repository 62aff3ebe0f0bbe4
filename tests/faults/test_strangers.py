"""Strangers at the port of a running controller, and a node that claims to be another: nobody is disturbed."""

import asyncio
import random
from contextlib import asynccontextmanager, suppress

import pytest
import pytest_asyncio
import zmq
from support.actors import Victim
from support.cluster import DEADLINE_S, error_of, real_cluster
from support.procs import eventually

from miles_agents.wire import session as wire
from miles_agents.wire.keys import AgentKey, KeyPair
from miles_agents.wire.transport import DIALED
from miles_agents.wire.zmq_transport import ZmqDialer, ZmqNetwork

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=2) as cluster:
        cluster.mesh = await cluster.controller.spawn("healthy", Victim, dims={"hosts": 2})
        yield cluster


class Listener:
    """A dialer's handler that keeps the frames it gets."""

    def __init__(self):
        self.up = asyncio.Event()
        self.frames = []
        self.heard = asyncio.Event()

    def on_up(self, connection):
        self.up.set()

    def on_down(self, connection):
        self.up.clear()

    def on_message(self, connection, frames, user_id):
        self.frames.append(wire.parse_frame(frames[0]))
        self.heard.set()


@asynccontextmanager
async def dialing(cluster, own, **options):
    """A dialer with our transport, right server key and any key of its own."""
    server = AgentKey.from_line(cluster.controller.issue_key("node-0")).controller_public
    key = AgentKey("some-run", "some-node", server, own)
    network, listener = ZmqNetwork(), Listener()
    try:
        keys = key.client_keys()
        yield ZmqDialer(cluster.controller.address, listener, curve=keys, network=network, **options), listener
    finally:
        network.close()


def hello(session, node):
    payload = {"node": node, "info": None, "received": 0, "welcomed": False}
    return [wire.pack_frame(wire.HELLO, session, 0, 0, payload)]


@asynccontextmanager
async def undisturbed(cluster):
    """Calls go on meanwhile, on the same sessions, and all of them are answered."""
    over = asyncio.Event()
    pids = list((await cluster.mesh.pid.call()).values)

    async def keep_calling():
        count = 0
        while not over.is_set() or count < 20:
            assert list((await cluster.mesh.echo.call(count)).values) == [count] * 2
            count += 1

    calling = asyncio.create_task(keep_calling())
    try:
        yield
    finally:
        over.set()
        await asyncio.wait_for(calling, DEADLINE_S)
    assert list((await cluster.mesh.pid.call()).values) == pids
    assert len(cluster.events("node_joined")) == 2
    assert not cluster.events("node_link_down") and not cluster.events("node_dead")


def transport_stats(cluster):
    return cluster.controller.status()["counters"]["transport"]


async def refused_again(cluster, before):
    await eventually(lambda: transport_stats(cluster)["refused"] > before, DEADLINE_S, what="a refusal")


async def test_plain_zmq_without_keys_gets_nothing(cluster):
    before = transport_stats(cluster)["refused"]
    async with undisturbed(cluster):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(cluster.controller.address)
            socket.send_multipart(hello(1, "node-0"))
            await refused_again(cluster, before)
            assert socket.poll(0) == 0


async def test_an_unknown_key_gets_nothing(cluster):
    before = transport_stats(cluster)["refused"]
    async with undisturbed(cluster), dialing(cluster, KeyPair.generate()) as (dialer, listener):
        await refused_again(cluster, before)
        await eventually(lambda: "not allowed" in dialer.last_refusal, DEADLINE_S)
        assert not listener.up.is_set() and not listener.frames


async def test_a_key_of_one_node_cannot_join_as_another(cluster):
    own = AgentKey.from_line(cluster.controller.issue_key("node-0")).own
    async with undisturbed(cluster), dialing(cluster, own) as (dialer, listener):
        await asyncio.wait_for(listener.up.wait(), DEADLINE_S)
        dialer.send(DIALED, hello(4242, "node-1"))
        await asyncio.wait_for(listener.heard.wait(), DEADLINE_S)
        assert listener.frames[0].kind == wire.REFUSE and "another node" in str(listener.frames[0].payload)
    assert cluster.controller.status()["counters"]["impostors"] >= 1
    assert "node-1" in (await cluster.event("node_refused", "node-1")).subject


async def test_a_node_cannot_take_over_the_session_of_another(cluster):
    victim = cluster.controller.fabric.find("node-1").peer.session
    own = AgentKey.from_line(cluster.controller.issue_key("node-0")).own
    async with undisturbed(cluster), dialing(cluster, own) as (dialer, listener):
        await asyncio.wait_for(listener.up.wait(), DEADLINE_S)
        dialer.send(DIALED, hello(victim.session_id, "node-1"))
        await asyncio.wait_for(listener.heard.wait(), DEADLINE_S)
        assert listener.frames[0].kind == wire.REFUSE and "another key" in str(listener.frames[0].payload)


async def test_data_before_a_hello_is_told_to_greet_and_not_read(cluster):
    own = AgentKey.from_line(cluster.controller.issue_key("node-0")).own
    async with undisturbed(cluster), dialing(cluster, own) as (dialer, listener):
        await asyncio.wait_for(listener.up.wait(), DEADLINE_S)
        dialer.send(DIALED, [b"\xc1 no msgpack at all", b"x" * 1000])
        dialer.send(DIALED, [wire.pack_frame(wire.DATA, 77, 1, 0, [[1, 2, 3]])])
        await asyncio.wait_for(listener.heard.wait(), DEADLINE_S)
        assert listener.frames[0].kind == wire.RESET
    dropped = cluster.controller.status()["counters"]["dropped"]
    assert dropped["frame before HELLO"] >= 1


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 8, random.Random(3).randbytes(65536), b"\xff" * 4096])
async def test_garbage_on_the_port_is_hung_up_on(cluster, garbage):
    host, _, port = cluster.controller.address.removeprefix("tcp://").rpartition(":")
    async with undisturbed(cluster):
        reader, writer = await asyncio.open_connection(host, int(port))
        with suppress(OSError):
            writer.write(garbage)
            await writer.drain()
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def test_many_silent_connections_do_not_keep_others_out(cluster):
    host, _, port = cluster.controller.address.removeprefix("tcp://").rpartition(":")
    async with undisturbed(cluster):
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(100)]
        own = AgentKey.from_line(cluster.controller.issue_key("node-0")).own
        async with dialing(cluster, own) as (_, listener):
            await asyncio.wait_for(listener.up.wait(), DEADLINE_S)
        for _, writer in opened:
            writer.close()
        for _, writer in opened:
            with suppress(OSError):
                await writer.wait_closed()


@pytest.mark.full
async def test_a_frame_over_the_limit_costs_its_sender_the_connection_and_nobody_else(cluster):
    own = AgentKey.from_line(cluster.controller.issue_key("node-0")).own
    async with undisturbed(cluster), dialing(cluster, own, max_frame_bytes=1 << 30) as (dialer, listener):
        await asyncio.wait_for(listener.up.wait(), DEADLINE_S)
        dialer.send(DIALED, [b"x", memoryview(bytes(600 * 1024 * 1024))])
        await eventually(lambda: not listener.up.is_set(), DEADLINE_S, what="the connection is dropped")


async def test_errors_still_come_through_after_all_that(cluster):
    from miles_agents.wire.remote_error import RemoteError

    error = await error_of(cluster.mesh.slice(hosts=0).fail.call_one("as ever"), RemoteError)
    assert "as ever" in str(error)
