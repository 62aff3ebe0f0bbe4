"""A small HTTP/1.1 server for our own pages: GET for pages, POST without a body for orders, a bearer token on every
route, few connections, little memory.

Consumes requests on one listening socket, loopback unless told otherwise. Produces what the routes' handlers return.
Waits for clients, each wait bounded by ``HttpLimits.idle_s``; ``close`` unblocks everything.

Invariants: nothing is answered from a route without the token and an allowed ``Host`` (a web page that points its own
name at 127.0.0.1 has neither); nothing that a client sends or a handler raises reaches the event loop as an exception;
after ``close`` no task, socket or descriptor is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import parse_qsl, urlsplit

import h11

from miles_agents.errors import EnvironmentFault

log = logging.getLogger(__name__)

HttpResponse: TypeAlias = tuple[int, str, bytes]
"""Status, content type, body."""

Handler: TypeAlias = Callable[[], HttpResponse]
"""Answers one GET. Runs on the event loop: it must not block."""

Action: TypeAlias = Callable[[Mapping[str, str]], Awaitable[HttpResponse]]
"""Answers one POST, given its query. It bounds its own waiting, and is cancelled when the server closes."""

_CHUNK_BYTES = 64 * 1024
_TEXT = "text/plain; charset=utf-8"
_EMPTY: Mapping[int, HttpResponse] = {status: (status, _TEXT, b"") for status in (401, 404, 405, 421, 500)}


class CannotListen(EnvironmentFault):
    """The HTTP server found no address to listen on."""

    code = "E-HTTP-001"


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may take.

    Args:
        header_bytes: Longest request line and headers together; more is answered 431.
        idle_s: Time for a whole request to arrive, and for each 64 KiB of an answer to be taken.
        connections: Open connections; further ones are closed at once.
    """

    header_bytes: int = 16 * 1024
    idle_s: float = 30.0
    connections: int = 64


DEFAULT_LIMITS = HttpLimits()


class HttpServer:
    """Serves ``routes`` (path to handler) to whoever has ``token``.

    Args:
        routes: Exact paths; the query is ignored.
        actions: Exact paths of orders.
        token: The bearer token, ASCII.
        host: Address to listen on.
        port: 0 takes a free one.
        allowed_hosts: Names that requests may carry in ``Host`` besides loopback names and ``host`` itself.
        limits: What one client may take.
    """

    def __init__(
        self,
        routes: Mapping[str, Handler],
        *,
        token: str,
        actions: Mapping[str, Action] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        allowed_hosts: Collection[str] = (),
        limits: HttpLimits = DEFAULT_LIMITS,
    ) -> None:
        self._routes = dict(routes)
        self._actions = dict(actions or {})
        self._expected = b"Bearer " + token.encode("ascii")
        self._host = host
        self._port = port
        self._allowed_hosts = {"127.0.0.1", "localhost", "::1", host.lower()} | {name.lower() for name in allowed_hosts}
        self._limits = limits
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> HttpServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen.

        Raises:
            CannotListen: The address is taken, or not one of this machine.
        """
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self._port)
        except OSError as error:
            raise CannotListen(
                f"the status server cannot listen on {self._host}:{self._port}",
                evidence=str(error),
                advice="Choose port 0 (any free one), or an address that `ip address` shows on this machine.",
            ) from error
        self._port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where it listens, as ``http://host:port``; complete after ``start``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def close(self) -> None:
        """Stop listening and drop all clients, also in the middle of an answer. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or len(self._connections) >= self._limits.connections:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="http client")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # `drain` then waits until the kernel has everything, so that nothing is lost by the abort below.
            writer.transport.set_write_buffer_limits(high=0)
            client = _Client(reader, writer, self._limits)
            while await client.exchange(self._answer):
                pass
        except (OSError, TimeoutError, h11.RemoteProtocolError):
            pass  # the client left or dawdled; there is nobody to tell
        except Exception:  # boundary: a bug here costs one connection, never the controller's loop
            log.exception("HTTP connection failed")
        finally:
            writer.transport.abort()

    async def _answer(self, request: h11.Request) -> HttpResponse:
        headers = {name: value for name, value in request.headers}  # noqa: C416  # h11's pairs are not a mapping
        # First of all, and the same for every path, so that strangers learn nothing about the routes.
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            return _EMPTY[401]
        if _host_name(headers.get(b"host", b"")) not in self._allowed_hosts:
            return _EMPTY[421]
        path, _, query = request.target.decode("ascii").partition("?")
        try:
            if request.method == b"POST" and path in self._actions:
                return await self._actions[path](dict(parse_qsl(query)))
            if request.method != b"GET":
                return _EMPTY[405]
            handler = self._routes.get(path)
            return _EMPTY[404] if handler is None else handler()
        except Exception:  # boundary: a page that fails must not take the server with it
            log.exception("handler of %s failed", path)
            return _EMPTY[500]


class _Client:
    """One connection: reads requests, writes answers, both within the limits."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: HttpLimits) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)

    async def exchange(self, answer: Callable[[h11.Request], Awaitable[HttpResponse]]) -> bool:
        """One request and its answer. True: the connection can carry another."""
        try:
            async with asyncio.timeout(self._limits.idle_s):
                request = await self._request()
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            return False
        if request is None:
            return False
        await self._send(await answer(request), close=False)
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _request(self) -> h11.Request | None:
        """The next request, or None if the client is finished. A body is refused: GET has none."""
        request: h11.Request | None = None
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_CHUNK_BYTES))
            elif isinstance(event, h11.Request):
                request = event
                if self._http.they_are_waiting_for_100_continue:
                    return request  # answered without the body, then closed
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.Data):
                raise h11.RemoteProtocolError("a body where none is allowed", error_status_hint=413)
            else:
                return None

    async def _refuse(self, status: int) -> None:
        """Answer what could not be parsed, then take in a little more, else the answer would be lost in a reset."""
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        await self._send((status, _TEXT, b""), close=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(1.0, self._limits.idle_s)):
                self._writer.write_eof()
                while await self._reader.read(_CHUNK_BYTES):
                    pass

    async def _send(self, response: HttpResponse, *, close: bool) -> None:
        status, content_type, body = response
        headers = [
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        if status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        if close:
            headers.append(("Connection", "close"))
        await self._write(h11.Response(status_code=status, headers=headers))
        view = memoryview(body)
        for start in range(0, len(view), _CHUNK_BYTES):
            await self._write(h11.Data(data=bytes(view[start : start + _CHUNK_BYTES])))
        await self._write(h11.EndOfMessage())

    async def _write(self, event: h11.Event) -> None:
        self._writer.write(self._http.send(event) or b"")
        async with asyncio.timeout(self._limits.idle_s):
            await self._writer.drain()


def _host_name(header: bytes) -> str:
    """The name in a ``Host`` header, without port or brackets; "" if it has none."""
    text = header.decode("latin-1").strip().lower()
    try:
        name = urlsplit(f"//{text}").hostname or ""
        return str(ipaddress.ip_address(name)) if ":" in name else name
    except ValueError:
        return ""
