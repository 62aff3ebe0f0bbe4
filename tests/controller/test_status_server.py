"""The status server as clients meet it: over real sockets on loopback."""

import asyncio
import json
import logging
import math
import os
import socket
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest
import uvloop
from support.procs import eventually

from miles_controller.http_server import CannotListen, HttpLimits, HttpServer
from miles_controller.status_server import STATUS_FILE, StatusServer

SNAPSHOT = {"run": "r1", "nodes": [{"node": "node-0", "state": "ready"}]}
TOKEN = "sesame"


@pytest.fixture
def new_server(tmp_path):
    def new(snapshot=lambda: SNAPSHOT, **options):
        return StatusServer(snapshot, run_id="r1", directory=tmp_path, **options)

    return new


def get(url, token=None, headers=None):
    """GET without proxies: (status, body). Blocks: call it in a thread."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@asynccontextmanager
async def connected(server):
    where = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(server, data):
    """Send raw bytes, return all that comes until the server hangs up."""
    async with connected(server) as (reader, writer):
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 20)


async def outcome(server, data):
    """The same, a reset counts as silence."""
    try:
        return await exchange(server, data)
    except ConnectionError:
        return b""


def head(answer):
    return answer.split(b"\r\n")[0].decode()


def raw_get(token, path="/status", host="localhost", extra=""):
    return (
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n{extra}\r\n"
    ).encode()


async def still_serves(server):
    status, body = await asyncio.to_thread(get, f"{server.url}/status", server.token)
    return status == 200 and json.loads(body) == SNAPSHOT


async def test_the_snapshot_is_served_to_whoever_has_the_token(new_server):
    async with new_server() as server:
        assert await still_serves(server)
        status, body = await asyncio.to_thread(get, f"{server.url}/healthz", server.token)
        assert (status, json.loads(body)) == (200, {"ok": True, "run_id": "r1"})


async def test_the_file_names_address_and_token_to_its_owner_only_and_goes_with_the_server(new_server, tmp_path):
    async with new_server() as server:
        file = tmp_path / STATUS_FILE
        assert os.stat(file).st_mode & 0o777 == 0o600
        assert json.loads(file.read_text()) == {
            "run_id": "r1",
            "url": server.url,
            "token": server.token,
            "pid": os.getpid(),
        }
    assert list(tmp_path.iterdir()) == []


async def test_every_server_has_another_token(new_server):
    assert new_server().token != new_server().token
    assert len(new_server().token) >= 32


@pytest.mark.parametrize("path", ["/status", "/healthz", "/nothing"])
@pytest.mark.parametrize("token", [None, "", "wrong", "ü"])
async def test_without_the_right_token_every_path_says_401_and_nothing_else(new_server, path, token):
    async with new_server() as server:
        line = "" if token is None else f"Authorization: Bearer {token}\r\n"
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{line}Connection: close\r\n\r\n"
        answer = await exchange(server, request.encode("latin-1"))
        assert head(answer) == "HTTP/1.1 401 "
        assert answer.endswith(b"\r\n\r\n")


async def test_a_token_in_the_query_does_not_count(new_server):
    async with new_server() as server:
        status, _ = await asyncio.to_thread(get, f"{server.url}/status?token={server.token}")
        assert status == 401


async def test_the_query_is_ignored_and_unknown_paths_and_methods_are_refused(new_server):
    async with new_server() as server:
        token = server.token
        assert head(await exchange(server, raw_get(token, "/status?x=//[1"))) == "HTTP/1.1 200 "
        assert head(await exchange(server, raw_get(token, "//[1"))) == "HTTP/1.1 404 "
        assert head(await exchange(server, raw_get(token).replace(b"GET", b"DELETE"))) == "HTTP/1.1 405 "


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[0:0:0:0:0:0:0:1]", 200),
        ("head.cluster", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("[", 421),
        ("", 421),
    ],
)
async def test_only_loopback_and_named_hosts_are_answered(new_server, host, status):
    async with new_server(allowed_hosts=["Head.Cluster"]) as server:
        assert head(await exchange(server, raw_get(server.token, host=host))).split()[1] == str(status)


@pytest.mark.parametrize(
    ("garbage", "status"),
    [
        (b"\x00\xff\x16\x03\x01 hello\r\n\r\n", "400"),
        (b"GET /status HTTP/1.1\r\n\r\n", "400"),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", "413"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", "431"),
        (b"G" * 200_000, "431"),
    ],
)
async def test_what_is_no_proper_request_is_refused_and_the_next_client_is_served(new_server, garbage, status):
    async with new_server() as server:
        assert head(await exchange(server, garbage)).split()[1] == status
        assert await still_serves(server)


async def test_a_client_that_wants_to_send_a_body_is_answered_before_it_does(new_server):
    async with new_server() as server:
        request = raw_get(server.token, extra="Content-Length: 5\r\nExpect: 100-continue\r\n")
        assert head(await exchange(server, request)) == "HTTP/1.1 200 "


async def test_a_connection_carries_several_requests(new_server):
    async with new_server() as server, connected(server) as (reader, writer):
        for _ in range(3):
            writer.write(raw_get(server.token).replace(b"Connection: close\r\n", b""))
            headers = await reader.readuntil(b"\r\n\r\n")
            length = int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length)) == SNAPSHOT


async def test_a_client_that_dawdles_over_its_request_is_hung_up_on(new_server):
    async with new_server(limits=HttpLimits(idle_s=0.2)) as server, connected(server) as (reader, writer):
        writer.write(b"GET /status HTTP/1.1\r\nHost: loc")
        assert await asyncio.wait_for(reader.read(), 20) == b""
        assert await still_serves(server)


async def test_a_client_that_does_not_take_its_answer_is_hung_up_on(new_server):
    big = {"lines": ["x" * 1000] * 20_000}
    async with new_server(lambda: big, limits=HttpLimits(idle_s=0.3)) as server:
        where = urlsplit(server.url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((where.hostname, where.port))
            client.sendall(raw_get(server.token))
            await eventually(lambda: server._http._connections)
            # Nothing is read, so only the server's own limit can end the connection.
            await eventually(lambda: not server._http._connections, 20)


async def test_a_big_snapshot_arrives_whole(new_server):
    big = {"lines": ["x" * 1000] * 10_000}
    async with new_server(lambda: big) as server:
        status, body = await asyncio.to_thread(get, f"{server.url}/status", server.token)
        assert status == 200
        assert json.loads(body) == big


async def test_many_clients_at_once_are_all_served(new_server):
    async with new_server() as server:
        answers = await asyncio.gather(*(exchange(server, raw_get(server.token)) for _ in range(50)))
        assert {head(answer) for answer in answers} == {"HTTP/1.1 200 "}


async def test_beyond_the_limit_connections_are_dropped_until_others_leave(new_server):
    async with new_server(limits=HttpLimits(connections=2)) as server:
        async with connected(server), connected(server):
            await eventually(lambda: len(server._http._connections) == 2)
            assert await outcome(server, raw_get(server.token)) == b""
        await eventually(lambda: not server._http._connections)
        assert await still_serves(server)


async def test_closing_drops_clients_in_every_state(new_server):
    big = {"lines": ["x" * 1000] * 20_000}
    async with new_server(lambda: big) as server:
        async with connected(server) as (silent, _), connected(server) as (half, writer), connected(server) as busy:
            writer.write(b"GET /status HT")
            busy[1].write(raw_get(server.token))
            await busy[0].readexactly(100)
            await asyncio.wait_for(server.close(), 20)
            for reader in (silent, half):
                with suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), 20) == b""
        await server.close()
        assert not server._http._connections


async def test_clients_that_reset_the_connection_disturb_nobody(new_server):
    async with new_server() as server:
        for data in (b"", b"GET", raw_get(server.token)):
            async with connected(server) as (_, writer):
                writer.write(data)
                await writer.drain()
                writer.transport.abort()
        assert await still_serves(server)


async def test_a_failing_snapshot_is_a_500_without_detail_and_logged(new_server, caplog):
    def broken():
        raise ValueError("the secret is 42")

    async with new_server(broken) as server:
        with caplog.at_level(logging.ERROR):
            status, body = await asyncio.to_thread(get, f"{server.url}/status", server.token)
        assert (status, body) == (500, b"")
        assert "the secret is 42" in caplog.text
        assert (await asyncio.to_thread(get, f"{server.url}/healthz", server.token))[0] == 200


async def test_values_that_json_lacks_become_strings(new_server, tmp_path):
    odd = {"loss": math.nan, "path": tmp_path, 3: [math.inf, (1, -math.inf)], ("a", 1): None}
    async with new_server(lambda: odd) as server:
        _, body = await asyncio.to_thread(get, f"{server.url}/status", server.token)
        assert json.loads(body, parse_constant=pytest.fail) == {
            "loss": "nan",
            "path": str(tmp_path),
            "3": ["inf", [1, "-inf"]],
            "('a', 1)": None,
        }


async def test_a_handler_that_answers_nonsense_costs_one_connection(caplog):
    routes = {"/bad": lambda: (200, "text/plain\r\nInjected: 1", b""), "/good": lambda: (200, "text/plain", b"yes")}
    async with HttpServer(routes, token=TOKEN) as server:
        assert await exchange(server, raw_get(TOKEN, "/bad")) == b""
        assert "HTTP connection failed" in caplog.text
        assert (await exchange(server, raw_get(TOKEN, "/good"))).endswith(b"\r\n\r\nyes")


async def test_an_address_that_is_taken_is_a_clear_error(new_server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CannotListen, match="E-HTTP-001"):
        await new_server(port=taken.getsockname()[1]).start()
    assert not (tmp_path / STATUS_FILE).exists()


async def test_if_the_file_cannot_be_written_nothing_keeps_listening(new_server, tmp_path):
    server = new_server()
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError):
        await server.start()
    with pytest.raises(ConnectionRefusedError):
        await exchange(server, b"")


def test_it_works_on_uvloop_too(tmp_path):
    big = {"lines": ["x" * 1000] * 1000}

    async def main():
        async with StatusServer(lambda: big, run_id="r1", directory=tmp_path) as server, connected(server):
            answer = await exchange(server, raw_get(server.token))
            assert json.loads(answer.partition(b"\r\n\r\n")[2]) == big

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
