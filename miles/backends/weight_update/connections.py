"""HTTP connections to engines, and threads that wait for their answers, kept from update to update. Standard library.

To connect, to start a thread, and to have it get its turn beside a busy main thread take longer than to send a request:
one that is small goes out from the caller's thread, over a connection that is still there.

Engines of ours keep theirs open (``sglang_utils.environment``), so none is expected to close one just as a request is
on its way; one that was closed before is noticed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from miles.backends.weight_update.messages import EngineTarget
from miles.backends.weight_update.stream import host_and_port, keep_alive, readable

_THREADS_MOST = 1 << 16
"""They are started as they are needed: one for each request that is under way."""
_AT_ONCE_BYTES = 1 << 14
"""The most that a socket takes without waiting for the other side, whatever that does."""
_SHOWN = 500


class Refused(Exception):
    """An engine answered with an error."""


class Connections:
    """One per engine, by its URL. ``close`` it when no request is under way; then it can begin anew."""

    def __init__(self) -> None:
        self._pool = _no_threads()
        self._by_url: dict[str, socket.socket] = {}
        self._last: dict[str, Future[float]] = {}

    def close(self) -> None:
        """Also threads."""
        self._pool.shutdown(wait=True)
        self._pool = _no_threads()
        self.keep_only(())

    def keep_only(self, urls: Iterable[str]) -> None:
        """Close those to other engines."""
        for url in self._by_url.keys() - set(urls):
            self._drop(url)
        self._last = {url: last for url, last in self._last.items() if not last.done()}

    def post(
        self, engine: EngineTarget, path: str, body: Mapping[str, Any], timeout_s: float, connect_s: float
    ) -> Future[float]:
        """One request, which may be on its way when this returns. The future's value is the seconds that it took; it
        raises OSError, HTTPException, Refused."""
        began, request = time.perf_counter(), _request(engine, path, json.dumps(body).encode())

        def anew() -> float:
            self._say(self._connected(engine.url, connect_s), engine, request, timeout_s)
            return self._answered(engine, path, began)

        last = self._last.get(engine.url)
        assert last is None or last.done(), "two requests at a time would be given each other's answers"
        if self._has_said(engine, request, timeout_s):
            answer = self._pool.submit(self._answered, engine, path, began)
        else:
            answer = self._pool.submit(anew)
        self._last[engine.url] = answer
        return answer

    def _has_said(self, engine: EngineTarget, request: bytes, timeout_s: float) -> bool:
        """Whether it has gone out at once: it is small, and there is a connection that is still open."""
        kept = self._still_open(engine.url)
        if kept is None or len(request) > _AT_ONCE_BYTES:
            return False
        try:
            self._say(kept, engine, request, timeout_s)
        except OSError:
            return False
        return True

    def cut(self, url: str) -> None:
        """The request that is under way there ends with an error."""
        connected = self._by_url.get(url)
        if connected is not None:
            with contextlib.suppress(OSError):  # it has ended after all
                connected.shutdown(socket.SHUT_RDWR)

    def _still_open(self, url: str) -> socket.socket | None:
        """None: there is none, or the other side has closed it."""
        connected = self._by_url.get(url)
        if connected is not None and readable([connected.fileno()], 0.0):  # nothing was asked, so it is the end
            self._drop(url)
            return None
        return connected

    def _connected(self, url: str, timeout_s: float) -> socket.socket:
        """Raises OSError."""
        connected = self._still_open(url)
        if connected is None:
            connected = self._by_url[url] = socket.create_connection(host_and_port(url), timeout_s)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(connected)
        return connected

    def _say(self, connected: socket.socket, engine: EngineTarget, request: bytes, timeout_s: float) -> None:
        """Raises OSError."""
        try:
            connected.settimeout(timeout_s)
            connected.sendall(request)
        except BaseException:
            self._drop(engine.url)
            raise

    def _answered(self, engine: EngineTarget, path: str, began: float) -> float:
        """Raises OSError, HTTPException, Refused."""
        is_kept = False
        try:
            with contextlib.closing(http.client.HTTPResponse(self._by_url[engine.url], method="POST")) as answer:
                answer.begin()
                text = answer.read().decode(errors="replace")
                is_kept = not answer.will_close
        finally:
            if not is_kept:
                self._drop(engine.url)
        if answer.status != 200:
            raise Refused(f"POST {path} was answered with status {answer.status}: {text[:_SHOWN]}")
        return time.perf_counter() - began

    def _drop(self, url: str) -> None:
        connected = self._by_url.pop(url)
        with contextlib.suppress(OSError):  # it has ended
            connected.shutdown(socket.SHUT_RDWR)  # a process that was forked meanwhile has it, too
        connected.close()


def _no_threads() -> ThreadPoolExecutor:
    """That has none yet."""
    return ThreadPoolExecutor(_THREADS_MOST, thread_name_prefix="engine-calls")


def _request(engine: EngineTarget, path: str, data: bytes) -> bytes:
    """In one piece, so that it takes one write."""
    head = [f"POST {path} HTTP/1.1", f"Host: {urllib.parse.urlsplit(engine.url).netloc}", "Accept-Encoding: identity"]
    head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    head += [f"Authorization: Bearer {engine.api_key}"] if engine.api_key else []
    return "\r\n".join([*head, "", ""]).encode("latin-1") + data
