"""Requests to engines: over connections that are kept, as long as the engine keeps them."""

import base64
import contextlib
import json
import socket
from multiprocessing.reduction import ForkingPickler

import pytest

from miles.backends.weight_update.connections import Connections, Refused
from miles.backends.weight_update.messages import EngineTarget
from miles.backends.weight_update.order import order_payload
from miles.backends.weight_update.stream import Place, readable

WAIT_S = 60.0
BODY = {"text": "what an engine is told"}


class Server:
    """Of one connection after the other, by hand."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(WAIT_S)
        self.target = EngineTarget("engine-0", f"http://127.0.0.1:{self._socket.getsockname()[1]}", "key", 1, 1, False)
        self.connected = None

    def take(self):
        """The next connection."""
        self.hang_up()
        self.connected = self._socket.accept()[0]
        self.connected.settimeout(WAIT_S)

    def has_been_connected_to(self):
        return bool(readable([self._socket.fileno()], 0.0))

    def heard(self):
        """Head and body of a request."""
        data = b""
        while not data.endswith(b"}"):
            data += self.connected.recv(1 << 20)
        return data.decode().split("\r\n\r\n")

    def answer(self, status="200 OK", *fields):
        self.connected.sendall("\r\n".join([f"HTTP/1.1 {status}", "Content-Length: 4", *fields, "", "text"]).encode())

    def hang_up(self):
        if self.connected is not None:
            self.connected.close()

    def close(self):
        self.hang_up()
        self._socket.close()


@pytest.fixture
def server():
    with contextlib.closing(Server()) as server:
        yield server


@pytest.fixture
def connections():
    with contextlib.closing(Connections()) as connections:
        yield connections


def post(connections, server, body=BODY):
    return connections.post(server.target, "/path", body, WAIT_S, WAIT_S)


def exchange(connections, server, *fields, body=BODY):
    """A whole one, over the connection that is there."""
    future = post(connections, server, body)
    head, heard = server.heard()
    server.answer("200 OK", *fields)
    assert future.result(WAIT_S) >= 0.0
    return head, heard


def first_exchange(connections, server, *fields):
    future = post(connections, server)
    server.take()
    found = server.heard()
    server.answer("200 OK", *fields)
    future.result(WAIT_S)
    return found


def test_what_is_said_has_path_length_and_key(connections, server):
    head, body = first_exchange(connections, server)
    assert head.splitlines()[0] == "POST /path HTTP/1.1"
    assert {f"Content-Length: {len(body)}", "Authorization: Bearer key"} <= set(head.splitlines())
    assert body == '{"text": "what an engine is told"}'


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_connection_is_kept_for_the_next_request(connections, server, size):
    first_exchange(connections, server)
    for _ in range(3):
        exchange(connections, server, body={"text": size * "x"})
    connections.keep_only([server.target.url])
    exchange(connections, server)
    assert not server.has_been_connected_to()


def test_a_small_request_over_a_kept_connection_needs_no_thread(connections, server):
    first_exchange(connections, server)
    connections._pool.shutdown(wait=True)
    with pytest.raises(RuntimeError, match="after shutdown"):
        post(connections, server)
    assert server.heard()[0].startswith("POST /path")


def test_a_connection_that_the_engine_has_closed_is_made_anew(connections, server):
    first_exchange(connections, server)
    server.hang_up()
    first_exchange(connections, server)
    exchange(connections, server)


def test_a_connection_that_the_engine_means_to_close_is_not_kept(connections, server):
    first_exchange(connections, server, "Connection: close")
    first_exchange(connections, server)


def test_connections_to_engines_that_take_no_part_are_closed(connections, server):
    first_exchange(connections, server)
    connections.keep_only(["http://127.0.0.1:1"])
    assert server.connected.recv(1) == b""
    first_exchange(connections, server)


def test_after_the_end_all_can_begin_anew(connections, server):
    first_exchange(connections, server)
    connections.close()
    assert server.connected.recv(1) == b""
    first_exchange(connections, server)


def test_an_engine_that_refuses_is_quoted_and_its_connection_kept(connections, server):
    first_exchange(connections, server)
    future = post(connections, server)
    server.heard()
    server.answer("400 Bad Request")
    with pytest.raises(Refused, match="POST /path was answered with status 400: text"):
        future.result(WAIT_S)
    exchange(connections, server)


@pytest.mark.parametrize("by_us", [True, False])
def test_a_request_that_is_cut_ends_with_an_error_and_the_next_one_connects(connections, server, by_us):
    first_exchange(connections, server)
    future = post(connections, server)
    server.heard()
    connections.cut(server.target.url) if by_us else server.hang_up()
    with pytest.raises(ConnectionError):
        future.result(WAIT_S)
    first_exchange(connections, server)


@pytest.mark.parametrize("engine", ["engine-0", "engine-1", "of another length", "?" * 400, "élan"])
def test_each_rank_is_told_its_own_order(engine):
    for rank in (0, 11):
        place = Place("::1", 1234 + rank, "token" * 20)
        (named,) = ForkingPickler.loads(base64.b64decode(order_payload(place, engine, rank, 60.0, "tensor")))
        order = json.loads(named[0])
        wanted = {"place": ["::1", place.port, place.token], "engine": engine, "rank": rank}
        assert order == wanted | {"timeout_s": 60.0, "method": "tensor"} and named[1].numel() == 0
