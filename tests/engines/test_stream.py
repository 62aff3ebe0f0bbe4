"""The connection of a weight update: who is let in, what is carried, how it ends."""

import asyncio
import contextlib
import fcntl
import resource
import socket
import struct
import threading
from pathlib import Path

import msgpack
import pytest
from support.procs import eventually

from miles.backends.weight_update.stream import (
    Line,
    Listener,
    Place,
    StreamBroken,
    address_towards,
    connect,
    host_and_port,
    readable,
)

WAIT_S = 60.0
"""Of waits that end earlier unless something is wrong."""


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


HOSTS = ["127.0.0.1", *(["::1"] if has_ipv6() else [])]


def framed(data):
    return struct.pack("!I", len(data)) + data


async def accepted(listener):
    """The next one that knows the token."""
    found = []

    def look():
        came = listener.accept(0.0)
        return came is not None and (found.append(came) or True)

    await eventually(look)
    return found[0]


@contextlib.asynccontextmanager
async def line(host="127.0.0.1", **hello):
    """Both ends: the trainer's, the engine's."""
    with Listener(host, WAIT_S) as listener:
        far = connect(listener.place, hello, WAIT_S)
        near, said = await accepted(listener)
    assert said.items() >= hello.items()
    with contextlib.closing(near), contextlib.closing(far):
        yield near, far


def stranger(place, data=b""):
    """Connected, and has said this."""
    other = socket.create_connection((place.host, place.port), timeout=WAIT_S)
    other.sendall(data)
    return other


def is_polling(thread):
    """Whether a thread of this process is in ``poll``, by its number (x86-64, arm64)."""
    return Path(f"/proc/self/task/{thread}/syscall").read_text().split()[0] in {"7", "73", "271"}


def is_let_go(other):
    """Whether it finds the connection closed."""
    with contextlib.suppress(ConnectionResetError):
        return not readable([other.fileno()], 0.0) or other.recv(1) == b""
    return True


@pytest.mark.parametrize("host", HOSTS)
async def test_messages_of_any_size_go_both_ways(host):
    async with line(host, engine="engine-0") as (near, far):
        large = {"bytes": bytes(range(256)) * 40_000}
        sending = threading.Thread(target=near.send, args=(large,))
        sending.start()
        assert far.receive() == large
        sending.join()
        far.send({"said": "loaded", "number": 3})
        assert near.receive() == {"said": "loaded", "number": 3} and not near.has_message()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: trainer\r\n\r\n",
        framed(b"\xc1"),
        framed(b""),
        framed(msgpack.packb(["token"])),
        framed(msgpack.packb({})),
        framed(msgpack.packb({"token": "0" * 64})),
        framed(msgpack.packb({"token": "schlüssel"})),
        framed(msgpack.packb({"token": None, "error": "no"})),
        framed(msgpack.packb({"token": "0" * 5000})),
        struct.pack("!I", 0xFFFFFFFF),
    ],
)
async def test_who_does_not_know_the_token_is_let_go_and_who_does_comes_in(data):
    with Listener("127.0.0.1", WAIT_S) as listener, stranger(listener.place, data) as other:
        await eventually(lambda: listener.accept(0.0) is None and readable([other.fileno()], 0.0))
        assert is_let_go(other)
        with contextlib.closing(connect(listener.place, {"engine": "e"}, WAIT_S)):
            near, hello = await accepted(listener)
            near.close()
        assert hello["engine"] == "e"


@pytest.mark.parametrize("data", [b"", b"\0\0", framed(b"12345")[:-1]])
async def test_nobody_waits_for_a_stranger_that_says_less_than_a_hello(data):
    with Listener("127.0.0.1", WAIT_S) as listener, stranger(listener.place, data) as other:
        with contextlib.closing(connect(listener.place, {}, WAIT_S)):
            near, _ = await accepted(listener)
            near.close()
        assert not readable([other.fileno()], 0.0), "let go before its time"
        listener.close()
        await eventually(lambda: readable([other.fileno()], 0.0))
        assert is_let_go(other)


async def test_who_speaks_later_than_it_connects_is_heard_at_once():
    """Not at the next look: an engine says hello some microseconds after it has connected."""
    with Listener("127.0.0.1", WAIT_S) as listener, stranger(listener.place):
        with stranger(listener.place) as other:
            await eventually(lambda: listener.accept(0.0) is None and len(listener._strangers) == 2)
            threads = []

            def wait():
                threads.append(threading.get_native_id())
                return listener.accept(WAIT_S)

            waiting = asyncio.create_task(asyncio.to_thread(wait))
            await eventually(lambda: waiting.done() or (threads and is_polling(threads[0])))
            other.sendall(framed(msgpack.packb({"token": listener.place.token, "engine": "late"})))
            came = await waiting
        assert came is not None and came[1]["engine"] == "late"
        came[0].close()


async def test_strangers_that_say_nothing_are_let_go_after_a_while_and_when_there_are_many():
    with Listener("127.0.0.1", WAIT_S, hello_s=0.05) as listener, stranger(listener.place) as other:
        await eventually(lambda: listener.accept(0.0) is None and readable([other.fileno()], 0.0))
    with Listener("127.0.0.1", WAIT_S) as listener, contextlib.ExitStack() as stack:
        others = [stack.enter_context(stranger(listener.place)) for _ in range(70)]
        await eventually(lambda: listener.accept(0.0) is None and readable([others[5].fileno()], 0.0))
        await eventually(lambda: listener.accept(0.0) is None and not readable([listener._socket.fileno()], 0.0))
        assert [bool(readable([other.fileno()], 0.0)) for other in others] == [True] * 6 + [False] * 64


async def test_who_comes_too_late_finds_that_out():
    with Listener("127.0.0.1", WAIT_S) as listener:
        with contextlib.closing(connect(listener.place, {}, WAIT_S)) as late:
            listener.close()
            with pytest.raises(StreamBroken):
                late.receive()
        with pytest.raises(StreamBroken, match="cannot be reached"):
            connect(listener.place, {}, WAIT_S)


async def test_what_is_wrong_on_the_other_side_is_handed_over():
    async with line() as (near, far):
        far.send({"error": "ValueError: there is no such weight"})
        far.close()
        with pytest.raises(StreamBroken, match="no such weight"):
            near.receive()
        with pytest.raises(StreamBroken, match="gone"):
            near.receive()


async def test_a_side_that_is_gone_or_silent_ends_every_wait():
    async with line() as (near, far):
        near.limit(0.05)
        with pytest.raises(StreamBroken, match="said nothing for too long"):
            near.receive()
        with pytest.raises(StreamBroken, match="said nothing for too long"):
            near.send({"bytes": bytes(64 << 20)})
        far.close()
        with pytest.raises(StreamBroken):  # the first may go before the end is known
            [near.send({"bytes": bytes(1 << 16)}) for _ in range(1000)]


async def test_a_message_that_comes_bit_by_bit_has_to_be_there_in_time():
    async with line() as (near, far):
        near.limit(0.3)
        is_over = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                far._socket.sendall(struct.pack("!I", 1 << 20))
                while not is_over.wait(0.01):
                    far._socket.sendall(b"0")

        dripping = threading.Thread(target=drip)
        dripping.start()
        with pytest.raises(StreamBroken, match="too long"):
            near.receive()
        is_over.set()
        dripping.join()


@pytest.mark.parametrize(
    ("data", "told"),
    [(framed(b"\xc1\xc1"), "."), (framed(msgpack.packb([1])), "no message"), (framed(bytes(200)), "200")],
)
async def test_what_is_no_message_or_too_large_ends_it(data, told):
    async with line() as (near, far):
        far._socket.sendall(data)
        with pytest.raises(StreamBroken, match=told):
            near.receive(100)


async def test_that_the_other_side_is_gone_is_seen_behind_what_it_said_last():
    async with line() as (near, far):
        far.send({"say": "bucket"})
        await eventually(near.has_message)
        assert not near.is_over()
        far.close()
        await eventually(near.is_over)
        assert near.receive() == {"say": "bucket"}


def test_descriptors_beyond_what_select_takes_are_waited_for():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    one, other = socket.socketpair()
    with one, other, socket.socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, 1500)) as high:
        assert readable([high.fileno()], 0.0001) == [] == readable([high.fileno()], 0.002)
        other.send(b"1")
        assert readable([high.fileno(), other.fileno()], WAIT_S) == [high.fileno()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_token_is_not_shown_and_differs_from_update_to_update():
    with Listener("127.0.0.1", WAIT_S) as one, Listener("127.0.0.1", WAIT_S) as other:
        assert one.place.token != other.place.token and len(one.place.token) == 64
        assert one.place.token not in repr(one.place)


@pytest.mark.parametrize("host", HOSTS)
def test_the_address_towards_somebody_is_one_of_ours(host):
    assert address_towards(host, 80) == host
    assert host_and_port("http://[::1]:30000") == ("::1", 30000)
    assert host_and_port("http://node7:80") == ("node7", 80)


def test_an_engine_that_cannot_reach_the_trainer_says_where_it_tried():
    with Listener("127.0.0.1", WAIT_S) as listener:
        place = listener.place
    with pytest.raises(StreamBroken, match=f"127.0.0.1 port {place.port} cannot be reached"):
        connect(Place(place.host, place.port, "token"), {}, 0.5)


def test_a_line_is_closed_twice_without_harm():
    one, other = socket.socketpair()
    with one, other:
        assert readable([one.fileno()], 0.0) == []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connected:
        end = Line(connected, WAIT_S)
        end.close()
        end.close()


async def test_one_wait_takes_in_who_connects_and_what_it_says_then():
    with Listener("127.0.0.1", WAIT_S) as listener:
        waiting = asyncio.create_task(asyncio.to_thread(listener.accept, WAIT_S))
        with stranger(listener.place) as other:
            await eventually(lambda: waiting.done() or listener._strangers)
            other.sendall(framed(msgpack.packb({"token": listener.place.token, "engine": "late"})))
            came = await waiting
        assert came is not None and came[1]["engine"] == "late"
        came[0].close()
