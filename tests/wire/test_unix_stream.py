"""Streams: whatever pieces the bytes come in, messages come out whole, in order, once; nonsense ends its stream."""

import asyncio
import errno
import itertools
import random
import socket
import struct
import threading
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.transports import DEADLINE_S, eventually

from miles_agents.wire import unix_stream
from miles_agents.wire.transport import ZERO_COPY_BYTES
from miles_agents.wire.turns import current_turn
from miles_agents.wire.unix_stream import MAX_FRAMES, Stream

LIMIT = 1 << 20
SCRATCH = unix_stream._SCRATCH_BYTES
BORDERS = [
    *(0, 1, 7, 8, 9),
    *(ZERO_COPY_BYTES - 9, ZERO_COPY_BYTES - 8, ZERO_COPY_BYTES - 1, ZERO_COPY_BYTES, ZERO_COPY_BYTES + 1),
    *(SCRATCH - 9, SCRATCH - 8, SCRATCH - 1, SCRATCH, SCRATCH + 1),
]
SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class End:
    """One end of a pair of sockets with a stream on it, which remembers what it hears."""

    def __init__(self, sock, limit=LIMIT):
        self.heard = []
        self.ended = []
        self.react = lambda message: None
        self._news = asyncio.Event()
        self.stream = Stream(sock, limit, self._on_frames, self._on_end)

    def _on_frames(self, frames):
        message = [bytes(frame) for frame in frames]
        self.heard.append(message)
        self._news.set()
        self.react(message)

    def _on_end(self, why):
        self.ended.append(why)
        self._news.set()

    async def until(self, condition):
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def an_end(limit=LIMIT, buffer_bytes=0):
    """A stream, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    if buffer_bytes:
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    theirs.setblocking(False)
    end = End(ours, limit)
    try:
        yield end, theirs
    finally:
        end.stream.close()
        theirs.close()


@asynccontextmanager
async def two_ends(limit=LIMIT, buffer_bytes=0):
    async with an_end(limit, buffer_bytes) as (end, theirs):
        other = End(theirs, limit)
        try:
            yield end, other
        finally:
            other.stream.close()


def packed(message):
    sizes = [len(frame) for frame in message]
    return struct.pack(f"<{len(message) + 1}I", len(message), *sizes) + b"".join(message)


async def feed(sock, data, cuts=()):
    """Write the bytes in pieces; between pieces the reader has its turn."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    loop = asyncio.get_running_loop()
    for start, end in itertools.pairwise(places):
        await loop.sock_sendall(sock, data[start:end])
        await asyncio.sleep(0)
        await asyncio.sleep(0)


small_messages = st.lists(st.binary(max_size=20), min_size=1, max_size=5)
sizes_at_borders = st.lists(st.one_of(st.integers(0, 40), st.sampled_from(BORDERS)), min_size=1, max_size=4)
some_cuts = st.lists(st.integers(0, 1 << 22), max_size=12)


@SOME
@given(messages=st.lists(small_messages, max_size=12), cuts=some_cuts)
def test_messages_come_whole_and_in_order_wherever_the_bytes_are_cut(messages, cuts):
    async def main():
        async with an_end() as (end, theirs):
            await feed(theirs, b"".join(map(packed, messages)), cuts)
            await end.until(lambda: len(end.heard) == len(messages))
            assert end.heard == messages
            assert not end.ended

    asyncio.run(main())


@SOME
@given(messages=st.lists(sizes_at_borders, min_size=1, max_size=4), cuts=some_cuts, seed=st.integers(0, 99))
def test_frames_at_the_borders_of_what_is_copied_and_what_fits_arrive_as_they_were(messages, cuts, seed):
    rng = random.Random(seed)
    made = [[rng.randbytes(size) for size in sizes] for sizes in messages]

    async def main():
        async with an_end() as (end, theirs):
            await feed(theirs, b"".join(map(packed, made)), cuts)
            await end.until(lambda: len(end.heard) == len(made))
            assert end.heard == made

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 5, 9, 13])
async def test_a_message_that_comes_byte_by_byte(size):
    message = [bytes(range(size)), b"", b"x" * size]
    async with an_end() as (end, theirs):
        data = packed(message) * 3
        await feed(theirs, data, range(len(data)))
        await end.until(lambda: len(end.heard) == 3)
        assert end.heard == [message] * 3


@pytest.mark.parametrize("frame", [b"", b"x", b"0123456789"], ids=len)
@pytest.mark.parametrize("count", [2, 1000, MAX_FRAMES])
async def test_a_message_may_have_as_many_frames_as_the_most(frame, count):
    async with two_ends() as (end, other):
        assert end.stream.send([frame] * count)
        assert end.stream.send_small(b"behind it")
        await other.until(lambda: len(other.heard) == 2)
        assert other.heard == [[frame] * count, [b"behind it"]]


@pytest.mark.parametrize("tail", [b"", b"more"])
async def test_empty_frames_around_a_large_one_are_frames_too(tail):
    message = [b"", b"", bytes(SCRATCH + 5), b"", b"x", b"", tail]
    async with two_ends(limit=2 * SCRATCH) as (end, other):
        for _ in range(3):
            assert end.stream.send(message)
        await other.until(lambda: len(other.heard) == 3)
        assert other.heard == [message] * 3


HOSTILE = {
    "no frames": struct.pack("<II", 0, 0),
    "too many frames": struct.pack("<II", MAX_FRAMES + 1, 1),
    "most possible frames": b"\xff" * 8,
    "a frame above the limit": struct.pack("<II", 1, LIMIT + 1),
    "the second frame above the limit": struct.pack("<III", 2, 1, LIMIT + 1),
    "the largest size there is": struct.pack("<II", 1, 2**32 - 1),
    "words": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("before", [0, 3])
async def test_nonsense_ends_its_stream_after_what_came_before_and_no_other(data, before):
    async with an_end() as (end, theirs), two_ends() as (one, other):
        await feed(theirs, packed([b"good"]) * before + data)
        await end.until(lambda: bool(end.ended))
        assert end.heard == [[b"good"]] * before
        assert len(end.ended) == 1
        assert "not our protocol" in end.ended[0]
        assert end.stream.closed
        assert not end.stream.send_small(b"x")
        assert theirs.recv(1) == b""
        assert one.stream.send_small(b"still")
        await other.until(lambda: other.heard == [[b"still"]])


async def test_a_limit_below_what_is_copied_holds_as_well():
    async with an_end(limit=100) as (end, theirs):
        await feed(theirs, packed([bytes(100)]) + packed([bytes(101)]))
        await end.until(lambda: bool(end.ended))
        assert end.heard == [[bytes(100)]]


@SOME
@given(data=st.binary(max_size=200), cuts=some_cuts)
def test_any_bytes_are_messages_or_the_end(data, cuts):
    async def main():
        async with an_end(limit=50) as (end, theirs):
            try:
                await feed(theirs, data, cuts)
                theirs.shutdown(socket.SHUT_WR)
            except OSError:
                assert end.stream.closed
            await end.until(lambda: bool(end.ended))
            assert len(end.ended) == 1
            whole = b"".join(map(packed, end.heard))
            assert data.startswith(whole)

    asyncio.run(main())


async def test_what_came_before_the_end_is_read_before_its_end_is_told():
    async with an_end() as (end, theirs):
        theirs.setblocking(True)
        sender = threading.Thread(target=lambda: (theirs.sendall(packed([b"x" * 1000]) * 500), theirs.close()))
        end.react = lambda _: end.ended and pytest.fail("a message after the end")
        sender.start()
        await end.until(lambda: bool(end.ended))
        sender.join()
        assert len(end.heard) == 500


async def test_a_message_cut_off_by_the_end_is_never_delivered():
    for cut in (3, 8, 20, ZERO_COPY_BYTES + 50, SCRATCH + 50):
        async with an_end() as (end, theirs):
            await feed(theirs, packed([b"whole"]) + packed([bytes(SCRATCH + 100)])[:cut])
            theirs.close()
            await end.until(lambda end=end: bool(end.ended))
            assert end.heard == [[b"whole"]]


async def test_a_slow_reader_gets_everything_in_order_though_little_fits():
    rng = random.Random(5)
    async with two_ends(buffer_bytes=4096) as (end, other):
        sent = []
        for index in range(300):
            sizes = [rng.choice([0, 5, 3000, 20_000, ZERO_COPY_BYTES, 100_000]) for _ in range(rng.randrange(3))]
            message = [index.to_bytes(4, "big"), *map(rng.randbytes, sizes)]
            assert end.stream.send(message)
            sent.append(message)
        await other.until(lambda: len(other.heard) == len(sent))
        assert other.heard == sent


async def test_several_threads_write_to_a_slow_reader_and_each_keeps_its_order():
    num_threads, num_messages = 4, 150
    async with two_ends(buffer_bytes=4096) as (end, other):

        def send_all(number):
            rng = random.Random(number)
            for index in range(num_messages):
                head = bytes([number]) + index.to_bytes(4, "big")
                if index % 3:
                    assert end.stream.send_small(head + bytes(rng.randrange(3000)))
                else:
                    assert end.stream.send([head, bytes([number]) * rng.choice([10, ZERO_COPY_BYTES + 1])])

        threads = [threading.Thread(target=send_all, args=[number]) for number in range(num_threads)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        await other.until(lambda: len(other.heard) == num_threads * num_messages)
        for number in range(num_threads):
            own = [message for message in other.heard if message[0][0] == number]
            assert [int.from_bytes(message[0][1:5], "big") for message in own] == list(range(num_messages))
            assert all(set(message[1]) == {number} for message in own if len(message) == 2)


async def test_what_waits_for_room_may_change_if_it_is_small():
    async with two_ends(buffer_bytes=4096) as (end, other):
        large = bytes(4 * ZERO_COPY_BYTES)
        small = bytearray(b"as it was")
        assert end.stream.send([large, small])
        assert end.stream.send([memoryview(small), large])
        small[:] = b"otherwise"
        await other.until(lambda: len(other.heard) == 2)
        assert other.heard == [[large, b"as it was"], [b"as it was", large]]


class Failing(socket.socket):
    """A socket whose kernel runs out of memory after some writes, and recovers."""

    def __init__(self, sock, good_writes, bad_writes=1):
        super().__init__(fileno=sock.detach())
        self.turns = [True] * good_writes + [False] * bad_writes

    def send(self, *args):
        if self.turns and not self.turns.pop(0):
            raise OSError(errno.ENOBUFS, "no buffer space")
        return super().send(*args)

    def sendmsg(self, *args):
        if self.turns and not self.turns.pop(0):
            raise OSError(errno.ENOBUFS, "no buffer space")
        return super().sendmsg(*args)


@pytest.mark.parametrize("good_writes", [0, 1, 2])
@pytest.mark.parametrize("frame", [b"x" * 20_000, b"x" * 400_000], ids=len)
async def test_a_write_that_fails_ends_the_stream_so_that_no_half_message_is_followed_by_another(good_writes, frame):
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    end, other = End(Failing(ours, good_writes)), End(theirs)
    for number in range(3):
        end.stream.send([bytes([number]), frame])
    await other.until(lambda: bool(other.ended))
    await end.until(lambda: bool(end.ended))
    assert other.ended == ["the peer closed the connection"]
    assert other.heard == [[bytes([number]), frame] for number in range(len(other.heard))]
    assert len(other.heard) <= good_writes


async def test_a_peer_that_is_gone_makes_sending_fail_and_is_told_once():
    async with two_ends() as (end, other):
        other.stream.close()
        await eventually(lambda: not end.stream.send([b"into the void", bytes(ZERO_COPY_BYTES)]))
        await end.until(lambda: bool(end.ended))
        assert len(end.ended) == 1
        assert not end.stream.send([b"x"])
        assert other.ended == []


async def test_a_handler_that_raises_loses_only_its_own_message_also_of_a_large_one():
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    async with two_ends() as (end, other):

        def react(message):
            if message[0] == b"poison":
                raise LookupError

        other.react = react
        for data in (b"one", b"poison", b"two", b"poison", b"three"):
            assert end.stream.send([data, bytes(SCRATCH)])
            assert end.stream.send_small(data)
        await other.until(lambda: len(other.heard) == 10)
        assert len(failures) == 4
        assert not current_turn().reading


@pytest.mark.parametrize("size", [1, ZERO_COPY_BYTES, SCRATCH])
async def test_closing_in_the_middle_of_what_was_read_calls_nothing_back_any_more(size):
    async with two_ends() as (end, other):
        other.react = lambda _: other.stream.close()
        for _ in range(5):
            end.stream.send([bytes(size)])
        await eventually(lambda: other.stream.closed and bool(end.ended))
        assert len(other.heard) == 1
        assert other.ended == []


async def test_many_messages_of_one_read_are_one_turn_and_all_but_the_last_know_of_more():
    flushed, more = [], []
    async with an_end() as (end, theirs):

        def react(_):
            turn = current_turn()
            assert turn.reading
            more.append(turn.more)
            if len(more) == 1:
                turn.at_end(lambda: flushed.append(len(end.heard)))

        end.react = react
        await feed(theirs, packed([b"x"]) * 4)
        await end.until(lambda: len(end.heard) == 4)
        await eventually(lambda: bool(flushed))
        assert more == [True, True, True, False]
        assert flushed == [4]
        assert not current_turn().reading
