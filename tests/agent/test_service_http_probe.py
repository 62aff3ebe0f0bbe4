"""The health probe against servers that answer in every way."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from miles_agents.agent.http_probe import get_status


@asynccontextmanager
async def server(answer, *, close=True, host="127.0.0.1"):
    """Answers each connection with fixed bytes; yields the port and the requests seen."""
    requests = []
    done = asyncio.Event()

    async def handle(reader, writer):
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        if not close:
            await done.wait()
        writer.close()

    listening = await asyncio.start_server(handle, host, 0)
    try:
        yield listening.sockets[0].getsockname()[1], requests
    finally:
        done.set()
        listening.close()
        await listening.wait_closed()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", 200),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", 302),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", 503),
        (b"", "connection closed before an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "connection closed before an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "not a valid HTTP answer"),
        (b"\x00\x01zmq\r\n\r\n", "not a valid HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000, "the answer is larger than 1000 bytes"),
    ],
)
async def test_an_answer_is_a_status_or_a_reason(answer, expected):
    async with server(answer) as (port, requests):
        found = await get_status("127.0.0.1", port, "/health?deep=1", timeout_s=10, max_bytes=1000)
    assert found == expected if isinstance(expected, int) else str(found).startswith(expected)
    assert requests[0].startswith(b"GET /health?deep=1 HTTP/1.1\r\n")
    assert b"close" not in requests[0]
    assert b"Host: 127.0.0.1:%d\r\n" % port in requests[0]


async def test_silence_ends_at_the_deadline():
    async with server(b"HTTP/1.1 200 OK\r\n", close=False) as (port, _):
        assert await get_status("127.0.0.1", port, "/", timeout_s=0.1) == "no answer in 0.1 s"


async def test_nobody_there_is_a_reason():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert await get_status("127.0.0.1", port, "/", timeout_s=10) == f"connection refused on port {port}"


async def test_a_name_that_means_nothing_is_a_reason():
    found = await get_status("256.0.0.0.1", 80, "/", timeout_s=10)
    assert str(found).startswith(("cannot connect: ", "no answer"))


async def test_a_path_that_is_no_path_is_a_reason():
    async with server(b"") as (port, _):
        assert str(await get_status("127.0.0.1", port, "/a b", timeout_s=10)).startswith("not a valid HTTP")
