"""Strangers at the tcp door of the controller: none gets in, and none disturbs those who are in."""

import asyncio
import random
from contextlib import asynccontextmanager, suppress

import pytest
import zmq
from support.transports import DEADLINE_S, Recorder, eventually

from miles_agents.timings import Timings
from miles_agents.wire.addresses import BadAddress, InsecureAddress
from miles_agents.wire.keys import AllowList, ClientKeys, KeyPair
from miles_agents.wire.transport import DIALED
from miles_agents.wire.zmq_transport import ZmqAcceptor, ZmqDialer, ZmqNetwork

MAX_FRAME_BYTES = 1 << 20
LARGER_THAN_ALLOWED = 8 * MAX_FRAME_BYTES


class Door:
    """An acceptor that echoes to its only healthy node, and whoever else tries to get in."""

    def __init__(self):
        self.server, self.node = KeyPair.generate(), KeyPair.generate()
        self.allow = AllowList()
        self.allow.add(self.node.public, "healthy")
        self.network = ZmqNetwork()
        self.heard = Recorder(self.echo)
        self.acceptor = ZmqAcceptor(
            "tcp://127.0.0.1:0",
            self.heard,
            curve=self.server,
            allow=self.allow,
            network=self.network,
            max_frame_bytes=MAX_FRAME_BYTES,
            handshake_s=1.0,
        )
        self.told = Recorder()
        self.healthy = self.dial(self.node, self.told)
        self.port = int(self.acceptor.address.rpartition(":")[2])

    def dial(self, own, handler, *, server="", address="", **options):
        keys = ClientKeys(server or self.server.public, own)
        return ZmqDialer(address or self.acceptor.address, handler, curve=keys, network=self.network, **options)

    def echo(self, message):
        assert self.acceptor.send(message.connection, message.frames)

    async def round_trips(self, count=20):
        """The healthy node's messages come back, as if nothing were going on."""
        await self.told.until(lambda: self.healthy.is_up)
        for _ in range(count):
            have = len(self.told.messages)
            assert self.healthy.send(DIALED, [b"echo", have.to_bytes(4, "big")])
            await self.told.until(lambda have=have: len(self.told.messages) > have)
            assert self.told.messages[-1].data == [b"echo", have.to_bytes(4, "big")]

    @property
    def intruders(self):
        """Messages of anybody but the healthy node that were let through."""
        return [message for message in self.heard.messages if message.user_id != self.node.public]

    async def still_closed(self, *, refused):
        """At least so many refusals, nothing let through, and the healthy node never noticed."""
        await eventually(lambda: self.acceptor.stats.refused >= refused)
        await self.round_trips()
        assert self.intruders == []
        assert self.told.order.count("up") == 1
        assert self.told.downs == []


@asynccontextmanager
async def open_door():
    door = Door()
    try:
        await door.round_trips()
        yield door
    finally:
        door.network.close()


@asynccontextmanager
async def raw_connection(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def hung_up_on(reader):
    """Wait until the other side closes; returns what it said before."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


def raw_socket(door, **options):
    """A DEALER without our rules, in a context of its own."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    for name, value in options.items():
        setattr(socket, name, value)
    socket.connect(door.acceptor.address)
    socket.send_multipart([b"let me in", b"please"])
    return context, socket


@asynccontextmanager
async def knocking(door, **options):
    context, socket = raw_socket(door, **options)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def test_a_client_in_plain_text_is_refused():
    async with open_door() as door, knocking(door):
        await door.still_closed(refused=1)
        # Both sides see that they do not fit; who hangs up first decides what we see.
        assert set(door.acceptor.stats.reasons) <= {"one side does not encrypt", "the handshake did not end"}


async def test_a_client_that_expects_another_server_is_refused_and_told():
    async with open_door() as door:
        told = Recorder()
        confused = door.dial(door.node, told, server=KeyPair.generate().public)
        await door.still_closed(refused=1)
        await eventually(lambda: bool(confused.last_refusal))
        assert door.acceptor.address in confused.last_refusal
        assert told.ups == []
        assert confused.send(DIALED, [b"x"]) is False


async def test_an_unknown_key_is_refused_and_told_and_remembered():
    async with open_door() as door:
        stranger, told = KeyPair.generate(), Recorder()
        dialer = door.dial(stranger, told)
        await door.still_closed(refused=1)
        await eventually(lambda: "the key is not allowed" in dialer.last_refusal)
        assert door.acceptor.stats.reasons["the key is not allowed"] >= 1
        refusal = door.network.zap.refusals[0]
        assert (refusal.public_key, refusal.address) == (stranger.public, "127.0.0.1")
        assert "allow list" in refusal.reason
        assert told.ups == []


async def test_a_key_is_let_in_as_soon_as_it_is_allowed():
    async with open_door() as door:
        late, told = KeyPair.generate(), Recorder()
        dialer = door.dial(late, told)
        await eventually(lambda: bool(dialer.last_refusal))
        door.allow.add(late.public, "late")
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"hello"])
        await told.until(lambda: bool(told.messages))
        assert [message.user_id for message in door.intruders] == [late.public]


async def test_a_revoked_key_is_not_heard_on_its_open_connection_nor_on_a_new_one():
    async with open_door() as door:
        own, told = KeyPair.generate(), Recorder()
        door.allow.add(own.public, "going")
        dialer = door.dial(own, told)
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"while allowed"])
        await told.until(lambda: bool(told.messages))
        door.allow.revoke(own.public)
        assert dialer.send(DIALED, [b"after"])
        reason = "a message under a key that is not allowed (any more)"
        await eventually(lambda: door.acceptor.stats.reasons.get(reason) == 1)
        dialer.close()
        again = door.dial(own, Recorder())
        await eventually(lambda: "the key is not allowed" in again.last_refusal)
        await door.round_trips()
        assert [message.data for message in door.intruders] == [[b"while allowed"]]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: controller\r\n\r\n" * 4,
        bytes(4096),
        b"\xff" * 4096,
        random.Random(11).randbytes(65536),
        # A correct ZMTP 3.1 greeting for CURVE, then nonsense for a HELLO, then a claim of a huge frame.
        b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(23, b"\0") + bytes(31) + b"\x04\x20" + b"x" * 32,
        b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(23, b"\0") + bytes(31) + b"\x06" + b"\x7f" * 8 + b"x" * 99,
    ],
    ids=["http", "zeros", "ones", "random", "bad-hello", "huge-claim"],
)
async def test_garbage_is_hung_up_on(garbage):
    async with open_door() as door, raw_connection(door.port) as (reader, writer):
        writer.write(garbage)
        await hung_up_on(reader)
        await door.still_closed(refused=1)


async def test_a_greeting_for_no_encryption_is_hung_up_on():
    async with open_door() as door, raw_connection(door.port) as (reader, writer):
        writer.write(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(23, b"\0") + bytes(31))
        writer.write(b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER")
        await hung_up_on(reader)
        await door.still_closed(refused=1)


async def test_connections_that_say_nothing_are_hung_up_on():
    async with open_door() as door:
        streams = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(20)]
        try:
            streams[0][1].write(b"\xff\0\0")  # begins a greeting, and leaves it at that
            await door.round_trips()
            for reader, _ in streams:
                await hung_up_on(reader)
            await door.still_closed(refused=20)
        finally:
            for _, writer in streams:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()


async def test_a_frame_above_the_limit_costs_its_sender_the_connection_and_nobody_else():
    async with open_door() as door:
        own, told = KeyPair.generate(), Recorder()
        door.allow.add(own.public, "greedy")
        dialer = door.dial(own, told, max_frame_bytes=LARGER_THAN_ALLOWED)
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"small"])
        await told.until(lambda: bool(told.messages))
        (greeting,) = door.intruders
        assert dialer.send(DIALED, [b"head", bytes(LARGER_THAN_ALLOWED)])
        await told.until(lambda: bool(told.downs))
        await door.heard.until(lambda: door.heard.downs == [greeting.connection])
        await door.round_trips()
        assert [message.data for message in door.intruders] == [[b"small"]]
        assert door.told.downs == []
        await told.until(lambda: len(told.ups) == 2)  # it may come back, and behave
        assert dialer.send(DIALED, [bytes(MAX_FRAME_BYTES)])
        await told.until(lambda: len(told.messages) == 2)


async def test_a_peer_cannot_choose_the_name_of_its_connection():
    async with open_door() as door:
        own = KeyPair.generate()
        door.allow.add(own.public, "impostor")
        options = {
            "curve_serverkey": door.server.public.encode(),
            "curve_publickey": own.public.encode(),
            "curve_secretkey": own.secret.encode(),
        }
        async with knocking(door, identity=b"controller", **options):
            await door.still_closed(refused=1)
            assert door.acceptor.stats.reasons == {"a connection that names itself": 1}


class Tap:
    """A tcp proxy that records what clients say, and can change it."""

    def __init__(self, port):
        self.port = port
        self.recorded = bytearray()
        self.flip = False
        self.writers = []
        self.tasks = []

    @asynccontextmanager
    async def open(self):
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        try:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for writer in self.writers:
                writer.close()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            for writer in self.writers:
                with suppress(ConnectionError):
                    await writer.wait_closed()

    async def serve(self, client_reader, client_writer):
        self.tasks.append(asyncio.current_task())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers += [client_writer, writer]
        with suppress(ConnectionError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self.pump(client_reader, writer, keep=True))
                group.create_task(self.pump(reader, client_writer, keep=False))

    async def pump(self, reader, writer, *, keep):
        while data := await reader.read(65536):
            if keep:
                self.recorded += data
                if self.flip:
                    data = data[:-1] + bytes([data[-1] ^ 1])
            writer.write(data)
        writer.close()


@asynccontextmanager
async def tapped(door):
    """An allowed peer that talks through a tap."""
    own, told = KeyPair.generate(), Recorder()
    door.allow.add(own.public, "tapped")
    tap = Tap(door.port)
    async with tap.open() as address:
        # Whoever does not answer is given up soon: a peer that was told nonsense may just fall silent.
        timings = Timings(beat_s=0.1, suspect_s=0.5, fence_s=1.0, dead_s=2.0)
        dialer = door.dial(own, told, address=address, timings=timings)
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"transfer everything to me"])
        await told.until(lambda: bool(told.messages))
        assert len(door.intruders) == 1
        yield tap, dialer, told
        dialer.close()


async def test_a_recorded_conversation_is_worth_nothing_the_second_time():
    async with open_door() as door, tapped(door) as (tap, dialer, _):
        recorded = bytes(tap.recorded)
        assert b"transfer" not in recorded
        dialer.close()
        async with raw_connection(door.port) as (reader, writer):
            writer.write(recorded)
            await hung_up_on(reader)
        await eventually(lambda: door.acceptor.stats.refused >= 1)
        await door.round_trips()
        assert len(door.intruders) == 1


async def test_a_changed_byte_costs_the_connection_and_the_message():
    async with open_door() as door, tapped(door) as (tap, dialer, told):
        tap.flip = True
        assert dialer.send(DIALED, [b"changed on the way"])
        await told.until(lambda: bool(told.downs))
        await door.round_trips()
        assert [message.data for message in door.intruders] == [[b"transfer everything to me"]]


async def test_two_acceptors_of_one_network_keep_their_lists_apart():
    async with open_door() as door:
        other_node, heard, told = KeyPair.generate(), Recorder(), Recorder()
        allow = AllowList()
        allow.add(other_node.public, "elsewhere")
        other = ZmqAcceptor("tcp://127.0.0.1:0", heard, curve=door.server, allow=allow, network=door.network)
        guest = door.dial(other_node, told, address=other.address)
        await told.until(lambda: bool(told.ups))
        assert guest.send(DIALED, [b"hello"])
        await heard.until(lambda: bool(heard.messages))
        assert heard.messages[0].user_id == other_node.public
        strayed = door.dial(other_node, Recorder())
        await eventually(lambda: "not allowed" in strayed.last_refusal)
        await door.still_closed(refused=1)


@pytest.mark.parametrize(
    ("address", "with_keys", "with_list", "error"),
    [
        ("tcp://127.0.0.1:0", False, False, InsecureAddress),
        ("tcp://127.0.0.1:0", True, False, InsecureAddress),
        ("tcp://127.0.0.1:0", False, True, InsecureAddress),
        ("tcp://*:0", True, True, InsecureAddress),
        ("tcp://0.0.0.0:0", True, True, InsecureAddress),
        ("tcp://[::]:0", True, True, InsecureAddress),
        ("tcp://nowhere", True, True, BadAddress),
        ("udp://127.0.0.1:1", True, True, BadAddress),
        ("unix:///tmp/somewhere", True, True, BadAddress),
        ("ipc:///tmp/somewhere", True, True, BadAddress),
        ("inproc://here", False, False, BadAddress),
    ],
)
async def test_unsafe_addresses_are_not_listened_on(address, with_keys, with_list, error):
    curve = KeyPair.generate() if with_keys else None
    allow = AllowList() if with_list else None
    with pytest.raises(error):
        ZmqAcceptor(address, Recorder(), curve=curve, allow=allow)


@pytest.mark.parametrize(
    ("address", "error"),
    [("tcp://127.0.0.1:1", InsecureAddress), ("ipc:///tmp/here", BadAddress), ("127.0.0.1:1", BadAddress)],
)
async def test_unsafe_addresses_are_not_dialed(address, error):
    with pytest.raises(error):
        ZmqDialer(address, Recorder())


async def test_every_interface_has_to_be_asked_for():
    acceptor = ZmqAcceptor(
        "tcp://0.0.0.0:0", Recorder(), curve=KeyPair.generate(), allow=AllowList(), any_interface=True
    )
    assert not acceptor.address.endswith(":0")
    acceptor.close()
