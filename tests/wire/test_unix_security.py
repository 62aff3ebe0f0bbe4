"""Who gets in at a unix socket, who does not, and that nobody who is turned away disturbs those who are in."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager

import pytest
from support.transports import Recorder, UnixWorld, eventually

from miles_agents.wire.keys import AllowList, KeyPair
from miles_agents.wire.transport import DIALED
from miles_agents.wire.unix_auth import MAGIC, AcceptorProof, DialerProof, proof_key
from miles_agents.wire.unix_stream import Stream
from miles_agents.wire.unix_transport import UnixAcceptor, UnixDialer

NOBODY = 65534
IS_ROOT = os.geteuid() == 0
"""Only root can become another user; the tests that need one show nothing where it is not."""


class Door:
    """An acceptor that asks for proofs and echoes to its one healthy node, and whoever else tries to get in."""

    def __init__(self, world):
        self.world = world
        self.allow = world.allow
        self.address = f"unix://{world.directory}/door"
        self.heard = Recorder(self.echo)
        self.acceptor = UnixAcceptor(self.address, self.heard, allow=self.allow, handshake_s=1.0)
        world.made.append(self.acceptor)
        self.node = KeyPair.generate()
        self.allow.add(self.node.public, "healthy", proof_key(self.node))
        self.told = Recorder()
        self.healthy = self.dial(self.node, self.told)

    def dial(self, key, handler=None, **options):
        dialer = UnixDialer(self.address, handler or Recorder(), key=key, **options)
        self.world.made.append(dialer)
        return dialer

    def echo(self, message):
        self.acceptor.send(message.connection, message.frames)

    async def round_trips(self, count=5):
        await self.told.until(lambda: bool(self.told.ups))
        for _ in range(count):
            have = len(self.told.messages)
            assert self.healthy.send(DIALED, [b"echo", have.to_bytes(4, "big")])
            await self.told.until(lambda have=have: len(self.told.messages) > have)
            assert self.told.messages[-1].data == [b"echo", have.to_bytes(4, "big")]

    @property
    def intruders(self):
        return [message for message in self.heard.messages if message.user_id != self.node.public]

    async def still_closed(self, reason, *, times=1):
        """Refused for this reason, nothing let through, and the healthy node never noticed."""
        await eventually(lambda: self.acceptor.stats.reasons.get(reason, 0) >= times)
        await self.round_trips()
        assert self.intruders == []
        assert (self.told.ups, self.told.downs, self.heard.downs) == ([DIALED], [], [])


@asynccontextmanager
async def open_door():
    world = UnixWorld(keys=True)
    try:
        door = Door(world)
        await door.round_trips()
        yield door
    finally:
        world.close()


@asynccontextmanager
async def bare_socket(address):
    """A connection without our rules."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.connect(address.removeprefix("unix://"))
    try:
        yield sock
    finally:
        sock.close()


@asynccontextmanager
async def bare_stream(address):
    """Messages without our handshake: what came, and a way to answer."""
    async with bare_socket(address) as sock:
        came, ended = [], []
        stream = Stream(sock, 1 << 20, came.append, ended.append)
        yield stream, came, ended
        stream.close()


async def until_hung_up(sock):
    """Everything that the other side said before it hung up."""
    loop, said = asyncio.get_running_loop(), b""
    async with asyncio.timeout(10):
        try:
            while data := await loop.sock_recv(sock, 65536):
                said += data
        except ConnectionError:
            pass
    return said


# -- keys -----------------------------------------------------------------------------------------------------------


async def test_an_unknown_key_is_turned_away_and_told():
    async with open_door() as door:
        told = Recorder()
        dialer = door.dial(KeyPair.generate(), told)
        await door.still_closed("the key is not allowed")
        await eventually(lambda: bool(dialer.last_refusal))
        assert door.address in dialer.last_refusal
        assert "turned away" in dialer.last_refusal
        assert told.order == []
        assert dialer.send(DIALED, [b"x"]) is False


async def test_a_key_that_is_allowed_elsewhere_but_has_no_proof_here_is_turned_away():
    async with open_door() as door:
        far = KeyPair.generate()
        door.allow.add(far.public, "far")
        door.dial(far)
        await door.still_closed("the key is not allowed")


async def test_the_public_half_of_an_allowed_key_proves_nothing():
    async with open_door() as door, bare_stream(door.address) as (stream, came, ended):
        await eventually(lambda: len(came) == 1)
        thief = DialerProof(KeyPair.generate())
        _, nonce, mac = thief.answer(came[0])
        stream.send([door.node.public.encode(), nonce, mac])
        await eventually(lambda: bool(ended))
        assert len(came) == 1
        await door.still_closed("the key was not proved")


async def test_a_proof_is_good_for_one_connection_only():
    async with open_door() as door, bare_stream(door.address) as (first, came, _):
        await eventually(lambda: len(came) == 1)
        proof = DialerProof(door.node).answer(came[0])
        first.send(proof)
        await eventually(lambda: len(came) == 2)
        async with bare_stream(door.address) as (second, challenge, ended):
            await eventually(lambda: len(challenge) == 1)
            second.send(proof)
            await eventually(lambda: bool(ended))
        await door.still_closed("the key was not proved")


async def test_a_proof_sent_back_to_who_made_it_is_worth_nothing():
    # A node that listens and dials with one key must not be tricked into answering its own challenge.
    node = KeyPair.generate()
    allow = AllowList()
    allow.add(node.public, "n", proof_key(node))
    acceptor, dialer = AcceptorProof(allow), DialerProof(node)
    public, nonce, proof = dialer.answer(acceptor.challenge())
    (answer,) = acceptor.answer([public, nonce, proof])
    assert answer != proof
    again = DialerProof(node)
    again.answer([MAGIC, nonce])
    with pytest.raises(ValueError, match="did not prove"):
        again.answer([proof])


@pytest.mark.parametrize("answer", [[bytes(32)], [b""], [], [b"x", b"y"]], ids=len)
async def test_an_acceptor_that_does_not_know_the_key_is_hung_up_on(answer):
    world = UnixWorld()
    try:
        heard = Recorder()
        impostor = world.acceptor(heard)
        heard.react = lambda message: answer and impostor.send(message.connection, answer)
        told = Recorder()
        dialer = UnixDialer(impostor.address, told, key=KeyPair.generate(), handshake_s=0.3)
        world.made.append(dialer)
        # An acceptor without keys says nothing first, so a bare challenge is said for it.
        await eventually(lambda: bool(impostor._accepted))
        for name in list(impostor._accepted):
            impostor.send(name, [MAGIC, bytes(32)])
        await eventually(lambda: bool(dialer.last_refusal))
        expected = "the acceptor did not prove that it knows this node's key" if answer else "the handshake did not end"
        assert dialer.last_refusal == f"{impostor.address}: {expected}"
        assert dialer.stats.reasons == {expected: 1}
        assert told.order == []
    finally:
        world.close()


@pytest.mark.parametrize("greeting", [[b"hello", bytes(32)], [MAGIC], [MAGIC, bytes(31)], [b"x"] * 3])
async def test_an_acceptor_that_greets_otherwise_is_hung_up_on(greeting):
    world = UnixWorld()
    try:
        other = world.acceptor(Recorder())
        dialer = UnixDialer(other.address, Recorder(), key=KeyPair.generate())
        world.made.append(dialer)
        await eventually(lambda: bool(other._accepted))
        for name in list(other._accepted):
            other.send(name, greeting)
        await eventually(lambda: "not our protocol" in dialer.last_refusal)
    finally:
        world.close()


async def test_a_key_is_let_in_as_soon_as_it_is_allowed():
    async with open_door() as door:
        late, told = KeyPair.generate(), Recorder()
        dialer = door.dial(late, told)
        await eventually(lambda: bool(dialer.last_refusal))
        door.allow.add(late.public, "late", proof_key(late))
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"hello"])
        await told.until(lambda: bool(told.messages))
        assert [message.user_id for message in door.intruders] == [late.public]


async def test_a_revoked_key_is_not_heard_on_its_open_connection_nor_on_a_new_one():
    async with open_door() as door:
        going, told = KeyPair.generate(), Recorder()
        door.allow.add(going.public, "going", proof_key(going))
        dialer = door.dial(going, told)
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"while allowed"])
        await told.until(lambda: bool(told.messages))
        door.allow.revoke(going.public)
        assert dialer.send(DIALED, [b"after"])
        reason = "a message under a key that is not allowed (any more)"
        await eventually(lambda: door.acceptor.stats.reasons.get(reason) == 1)
        dialer.close()
        door.dial(going)
        await eventually(lambda: door.acceptor.stats.reasons.get("the key is not allowed", 0) >= 1)
        await door.round_trips()
        assert [message.data for message in door.intruders] == [[b"while allowed"]]


def test_the_proof_key_is_not_the_secret_and_differs_by_node():
    one, other = KeyPair.generate(), KeyPair.generate()
    assert proof_key(one) == proof_key(KeyPair(one.public, one.secret))
    assert proof_key(one) != proof_key(other)
    assert one.secret.encode() not in proof_key(one)
    assert proof_key(one).hex() not in json.dumps(repr(one))


# -- before the proof -------------------------------------------------------------------------------------------------


async def test_a_handshake_that_never_ends_is_hung_up_on():
    async with open_door() as door, bare_socket(door.address) as silent, bare_socket(door.address) as slow:
        slow.send(b"\x03")
        for sock in (silent, slow):
            assert MAGIC in await until_hung_up(sock)
        await door.still_closed("the handshake did not end", times=2)


async def test_whoever_leaves_before_the_proof_is_counted_and_nobody_hears_of_it():
    async with open_door() as door:
        async with bare_socket(door.address):
            pass
        await door.still_closed("it left before it had proved its key")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        b"\xff" * 64,
        (1).to_bytes(4, "little") + (1025).to_bytes(4, "little"),
        (3).to_bytes(4, "little") + (1 << 28).to_bytes(4, "little") * 3,
    ],
    ids=["http", "zeros", "ones", "more than a proof needs", "huge claims"],
)
async def test_garbage_before_the_proof_is_hung_up_on_at_once(garbage):
    async with open_door() as door, bare_socket(door.address) as sock:
        sock.send(garbage)
        await until_hung_up(sock)
        await door.still_closed("it left before it had proved its key")
        assert "the handshake did not end" not in door.acceptor.stats.reasons


@pytest.mark.parametrize(
    "frames",
    [[b"hello"], [b""] * 3, [b"\xff" * 40, bytes(32), bytes(32)], [b"k" * 40, bytes(31), b""], [b"x"] * 4],
    ids=["hello", "empty", "not ascii", "short nonce", "four"],
)
async def test_a_message_that_is_no_proof_is_turned_away(frames):
    async with open_door() as door, bare_stream(door.address) as (stream, came, ended):
        stream.send(frames)
        stream.send_small(b"and this right behind it")
        await eventually(lambda: bool(ended))
        assert len(came) <= 1
        assert set(door.acceptor.stats.reasons) <= {"not our protocol", "the key is not allowed"}
        await door.round_trips()
        assert door.intruders == []


async def test_a_dialer_without_a_key_gets_nowhere():
    async with open_door() as door:
        dialer = door.dial(None)
        await eventually(lambda: dialer.send(DIALED, [b"let me in"]))
        await door.still_closed("not our protocol")


# -- other users ------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, socket, sys
path, role = sys.argv[1:]
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
sock = socket.socket(socket.AF_UNIX)
if role == "connect":
    try:
        sock.connect(path)
        sock.settimeout(10)
        print(repr(sock.recv(100)))
    except ConnectionResetError:
        print(repr(b""))
    except PermissionError:
        print("no permission")
else:
    sock.bind(path)
    sock.listen()
    print("listening", flush=True)
    sys.stdin.read()
"""


@contextmanager
def nobody(path, role):
    """A process of another user that connects or listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", AS_NOBODY.format(nobody=NOBODY), path, role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("keys", [False, True])
async def test_a_process_of_another_user_is_hung_up_on_unread_even_if_the_directory_lets_it_in(keys):
    if not IS_ROOT:
        return
    world = UnixWorld(keys=keys)
    try:
        heard = Recorder()
        acceptor = world.acceptor(heard)
        path = acceptor.address.removeprefix("unix://")
        with nobody(path, "connect") as process:
            assert await asyncio.to_thread(process.stdout.readline) == "no permission\n"
        world.directory.chmod(0o755)
        os.chmod(path, 0o777)
        with nobody(path, "connect") as process:
            assert await asyncio.to_thread(process.stdout.readline) == "b''\n"
        assert acceptor.stats.reasons == {"a process of another user": 1}
        assert heard.order == []
    finally:
        world.close()


async def test_a_listener_of_another_user_is_hung_up_on():
    if not IS_ROOT:
        return
    world = UnixWorld()
    try:
        inside = world.directory / "open"
        inside.mkdir()
        world.directory.chmod(0o755)
        inside.chmod(0o777)
        path = inside / "s"
        with nobody(str(path), "listen") as process:
            assert await asyncio.to_thread(process.stdout.readline) == "listening\n"
            told = Recorder()
            dialer = UnixDialer(f"unix://{path}", told)
            world.made.append(dialer)
            await eventually(lambda: "another user" in dialer.last_refusal)
            assert told.ups == []
            assert dialer.send(DIALED, [b"secret"]) is False
        path.unlink()
        inside.rmdir()
    finally:
        world.close()
