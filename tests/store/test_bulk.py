"""Fetching an object over TCP: right, or not at all; and nothing for who has no ticket."""

import asyncio
import itertools
import os
import random
import socket
from contextlib import asynccontextmanager, suppress

import pytest
from support.procs import eventually, no_descriptors

from miles_agents.store.bulk_fetch import BulkClient
from miles_agents.store.bulk_serve import MAX_OFFERS, BulkServer, Offer, send_stream
from miles_agents.store.bulk_wire import (
    CHUNK,
    HEAD_BYTES,
    HELLO_BYTES,
    BadPeer,
    Ticket,
    chunks_of,
    streams_for,
)
from miles_agents.store.layout import PAGE, align
from miles_agents.store.memory import Mapping, copy_bytes

HOST = "127.0.0.1"


def mapped(data):
    """Memory with that content."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, align(len(data), PAGE))
    mapping = Mapping(fd, align(len(data), PAGE), private=False)
    os.close(fd)
    copy_bytes(mapping.address, data)
    return mapping


@asynccontextmanager
async def serving(data, **options):
    """A server with one offer, and a client; ``over`` is set when the offer has ended."""
    server, client, over = BulkServer(HOST, **options), BulkClient(), asyncio.Event()
    try:
        await server.slot()
        yield server, client, server.offer(mapped(data), len(data), over.set), over
    finally:
        client.close()
        server.close()
        await eventually(over.is_set)


class Meddler:
    """A TCP forwarder that changes what the server says. ``change(position, data)`` gives what is passed on."""

    def __init__(self, port, change):
        self.port, self.change = port, change

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, HOST, 0)
        return self.server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        far_reader, far_writer = await asyncio.open_connection(HOST, self.port)
        far_writer.write(await reader.readexactly(HELLO_BYTES))
        position = 0
        try:
            while data := await far_reader.read(65536):
                changed = self.change(position, data)
                if changed is None:
                    break
                writer.write(changed)
                await writer.drain()
                position += len(data)
        except OSError:
            pass
        finally:
            for end in (writer, far_writer):
                end.close()


def at(ticket, port):
    """The same, to be used elsewhere."""
    return Ticket.from_plain([HOST, port, *ticket.to_plain()[2:]])


def content(nbytes):
    return random.Random(nbytes).randbytes(nbytes)


@pytest.mark.parametrize("nbytes", [1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3, 9 * CHUNK])
async def test_what_arrives_is_what_was_offered(nbytes):
    data, to = content(nbytes), bytearray(nbytes)
    async with serving(data) as (server, client, ticket, over):
        await client.fetch(ticket, memoryview(to))
        assert to == data
        await eventually(over.is_set, what="the end of the offer")
        assert not server.is_listening


@pytest.mark.parametrize(
    "position", [3, 8 + 3, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 70_000, CHUNK + HEAD_BYTES + 5]
)
async def test_a_changed_byte_is_found(position):
    def change(begin, data):
        if begin <= position < begin + len(data):
            data = bytearray(data)
            data[position - begin] ^= 1
        return data

    data = content(CHUNK + 100_000)
    async with serving(data) as (_, client, ticket, _), Meddler(ticket.port, change) as port:
        with pytest.raises((BadPeer, OSError)):
            await client.fetch(at(ticket, port), memoryview(bytearray(len(data))))


async def test_a_stream_that_breaks_off_is_an_error():
    data = content(3 * CHUNK)
    async with (
        serving(data) as (_, client, ticket, _),
        Meddler(ticket.port, lambda at, d: d if at < CHUNK else None) as port,
    ):
        with pytest.raises((BadPeer, OSError)):
            await client.fetch(at(ticket, port), memoryview(bytearray(len(data))))


def test_chunks_of_one_place_are_no_chunks_of_another():
    ticket = Ticket(HOST, 1, b"t" * 16, b"k" * 32, 9 * CHUNK, 4)
    data = memoryview(b"x" * 100)
    head = ticket.head(1, CHUNK, data)
    ticket.check_place(head, CHUNK, 100)
    ticket.check_data(1, head, data)
    for wrong in (Ticket(HOST, 1, b"u" * 16, b"k" * 32, 9 * CHUNK, 4), Ticket(HOST, 1, b"t" * 16, b"l" * 32, 1, 4)):
        with pytest.raises(BadPeer):
            wrong.check_data(1, head, data)
    with pytest.raises(BadPeer):
        ticket.check_data(2, head, data)
    with pytest.raises(BadPeer):
        ticket.check_place(head, 2 * CHUNK, 100)


@pytest.mark.parametrize("nbytes", [1, CHUNK, 2 * CHUNK, 8 * CHUNK + 1, 100 * CHUNK])
def test_the_streams_share_all_chunks(nbytes):
    streams = streams_for(nbytes)
    places = sorted(place for stream in range(streams) for place in chunks_of(nbytes, stream, streams))
    assert places[0][0] == 0 and sum(size for _, size in places) == nbytes
    assert all(at + size == after for (at, size), (after, _) in itertools.pairwise(places))


async def answer_to(port, said):
    """What a stranger gets who says that."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(said)
        async with asyncio.timeout(20):
            return await reader.read(1000)
    except OSError:
        return b""
    finally:
        writer.close()


async def test_wrong_tokens_keys_and_streams_get_nothing():
    async with serving(content(1000)) as (server, _, ticket, over):
        host, port, token, key, nbytes, streams = ticket.to_plain()
        wrong = [
            Ticket(host, port, bytes(16), key, nbytes, streams).hello(0),
            Ticket(host, port, token, bytes(32), nbytes, streams).hello(0),
            ticket.hello(1),
            b"x" * HELLO_BYTES,
            b"GET / HTTP/1.1\r\n\r\n" + bytes(HELLO_BYTES),
        ]
        for said in wrong:
            assert await answer_to(port, said) == b""
        assert server.num_refused == len(wrong) and not over.is_set()
        assert len(await answer_to(port, ticket.hello(0))) > 0


async def test_a_ticket_is_good_once():
    data = content(9 * CHUNK)
    async with serving(data) as (server, client, ticket, _):
        first = asyncio.create_task(answer_to(ticket.port, ticket.hello(0)))
        assert await first
        before = server.num_refused
        assert await answer_to(ticket.port, ticket.hello(0)) == b""
        assert server.num_refused == before + 1
        with pytest.raises((BadPeer, OSError)):
            await client.fetch(ticket, memoryview(bytearray(len(data))))


async def test_a_ticket_that_nobody_uses_expires():
    async with serving(content(1000), idle_s=0.1) as (server, _, ticket, over):
        await asyncio.wait_for(over.wait(), 20)
        assert not server.is_listening
        with pytest.raises(OSError):
            await asyncio.open_connection(HOST, ticket.port)


async def test_silent_strangers_are_hung_up_on_and_keep_nobody_out():
    data = content(CHUNK)
    async with serving(data, hello_s=0.3) as (server, client, ticket, _):
        strangers = [await asyncio.open_connection(HOST, ticket.port) for _ in range(60)]
        to = bytearray(len(data))
        await client.fetch(ticket, memoryview(to))
        assert to == data
        for reader, writer in strangers:
            async with asyncio.timeout(20):
                with suppress(OSError):
                    assert await reader.read(100) == b""
            writer.close()
        await eventually(lambda: server.num_refused >= 28, what="refusals")


async def test_there_are_only_so_many_offers_at_once():
    server, over = BulkServer(HOST), []
    try:
        tickets = []
        for number in range(MAX_OFFERS):
            await server.slot()
            tickets.append(server.offer(mapped(b"x"), 1, lambda number=number: over.append(number)))
        waiting = asyncio.create_task(server.slot())
        await asyncio.sleep(0)
        assert not waiting.done() and len({ticket.port for ticket in tickets}) == 1
        server.end(tickets[1].token)
        await asyncio.wait_for(waiting, 20)
        server.end(tickets[1].token)
        assert over == [1]
        server.free_slot()
    finally:
        server.close()
    assert sorted(over) == list(range(MAX_OFFERS))


async def test_a_server_that_closes_cuts_its_readers_off():
    data = content(9 * CHUNK)
    async with serving(data) as (server, client, ticket, over):
        fetching = asyncio.create_task(client.fetch(ticket, memoryview(bytearray(len(data)))))
        with socket.create_connection((HOST, ticket.port)):
            server.close()
        with pytest.raises((BadPeer, OSError)):
            await fetching
        await eventually(over.is_set)


async def test_whoever_is_cancelled_leaves_no_thread_that_writes():
    data, to = content(9 * CHUNK), bytearray(9 * CHUNK)
    async with serving(data) as (_, client, ticket, _):
        fetching = asyncio.create_task(client.fetch(ticket, memoryview(to)))
        await eventually(lambda: any(to[:: CHUNK // 64]), what="the first bytes")
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert client.num_transfers == 0


class Sip:
    """A socket whose other end takes little at a time; it has nothing that waits for all to be taken."""

    def __init__(self):
        self.taken, self.times = bytearray(), 0

    def settimeout(self, seconds):
        self.limit_s = seconds

    def send(self, data):
        self.times += 1
        self.taken += data[:60_000]
        return min(len(data), 60_000)


def test_the_time_limit_of_a_stream_is_for_each_step_and_not_for_a_chunk():
    data, sip = content(2 * CHUNK), Sip()
    ticket = Ticket(HOST, 1, b"t" * 16, b"k" * 32, len(data), 1)
    send_stream(sip, Offer(ticket, mapped(data), print), 0, 3.5)
    assert sip.limit_s == 3.5 and sip.times > len(data) // 60_000
    second = HEAD_BYTES + CHUNK
    assert sip.taken[HEAD_BYTES:second] == data[:CHUNK]
    assert sip.taken[second + HEAD_BYTES :] == data[CHUNK:]


async def test_without_descriptors_the_server_pauses_and_goes_on(caplog):
    data = content(1000)
    async with serving(data) as (_, client, ticket, _):
        stranger = socket.socket()
        with stranger:
            stranger.setblocking(False)
            with no_descriptors():
                with suppress(BlockingIOError):
                    stranger.connect((HOST, ticket.port))
                for _ in range(200):
                    await asyncio.sleep(0)
            refusals = [r for r in caplog.records if "nobody can be let in" in r.message]
            assert len(refusals) == 1
        to = bytearray(len(data))
        await client.fetch(ticket, memoryview(to))
        assert to == data
