"""HTTP for rollouts: one client per process on a loop thread of its own, with retries, keys and request ids.

Consumes requests of any thread or loop; produces parsed answers. Waits for the other side, for at most the request's
deadline; cancelling the caller ends the request. Invariants: whatever a caller's loop does, requests under way go on;
a request to an address of this run carries its API key; each ``/generate`` request to one, be it the router's or an
engine's own, carries an id (``rid``) that is in ``in_flight`` as long as an engine may be working on it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import uvloop

from miles.utils.async_utils import LoopThread
from miles.utils.misc import get_free_port
from miles.utils.spans import BusyLog
from miles_agents.errors import ConfigError, PeerFault

logger = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_RETRIES = 60
DEFAULT_DEADLINE_S = 4 * 3600.0
"""As long as the router gives a request."""
CONNECT_TIMEOUT_S = 10.0
MAX_BACKOFF_S = 1.0
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_ABSENT = frozenset({0, 502, 503})
"""No answer at all, or that of a router which has nobody behind it."""

request_scope: ContextVar[str] = ContextVar("request_scope", default="")
"""On whose behalf requests are made: what ``in_flight`` selects by. Tasks inherit it."""


class RequestFailed(PeerFault):
    """An HTTP request found nobody who answers it, also when repeated."""

    code = "E-ROLL-001"


class RequestRefused(ConfigError):
    """The other side says that a request is wrong; repeating it would not help."""

    code = "E-ROLL-002"


class HttpClient:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._thread = LoopThread("http", uvloop.new_event_loop())
        self._session: aiohttp.ClientSession | None = None
        self._keys: dict[str, str] = {}
        self._own: set[str] = set()
        self._restarted: set[str] = set()
        self._successors: dict[str, tuple[str, ...]] = {}
        self._in_flight: dict[str, str] = {}
        self._lock = threading.Lock()
        self.retries = 0
        self.generating = BusyLog("generate")
        """When requests to engines were under way."""

    # -- addresses of this run -------------------------------------------------------------------------------

    def register(self, url: str, api_key: str, *, is_restarted: bool = False) -> None:
        """An address of this run: requests to it carry the key, and ids of those that generate are kept.
        ``is_restarted``: who dies there is restarted, so that requests wait for that until their deadline."""
        origin = origin_of(url)
        with self._lock:
            self._successors.pop(origin, None)
            if is_restarted:
                self._restarted.add(origin)
            if api_key:
                self._keys[origin] = api_key  # at once: a request that reads it meanwhile must find one
            else:
                self._keys.pop(origin, None)
            self._own.add(origin)

    def moved(self, origin: str, to: Sequence[str]) -> None:
        """Who was there is gone: requests to it, those that are being repeated, too, go to one of these origins."""
        with self._lock:
            self._successors[origin] = tuple(to)

    def _where(self, url: str) -> str:
        with self._lock:
            successors = self._successors.get(origin_of(url))
        return urlsplit(url)._replace(netloc=random.choice(successors)).geturl() if successors else url  # noqa: S311

    def in_flight(self, scope: str) -> list[str]:
        """Ids of requests of this scope that engines may be working on."""
        with self._lock:
            return [rid for rid, of in self._in_flight.items() if of == scope]

    def forget(self, scope: str) -> None:
        """Requests of this scope whose connection was lost are not aborted any more."""
        with self._lock:
            for rid in [rid for rid, of in self._in_flight.items() if of == scope]:
                del self._in_flight[rid]

    # -- requests --------------------------------------------------------------------------------------------

    async def request(
        self,
        method: str,
        url: str,
        payload: Any = None,
        *,
        max_retries: int = DEFAULT_RETRIES,
        headers: dict[str, str] | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> Any:
        """The answer, parsed if it is JSON, else as text. From any loop.

        Args:
            method: ``GET`` or ``POST``.
            url: Where.
            payload: Sent as JSON.
            max_retries: How often it is repeated if nobody answers or the answer is a passing trouble (5xx, 429). The
                default, and more, is without bound where those who die are restarted (``register``).
            headers: Sent, too.
            deadline_s: For all attempts together.

        Raises:
            RequestFailed: No answer within these bounds.
            RequestRefused: The answer is another 4xx.
        """
        scope = request_scope.get()
        tracked = method == "POST" and self._is_generate(url) and isinstance(payload, dict)
        call = _Call(method, url, payload, headers or {}, max_retries, time.monotonic() + deadline_s, scope, tracked)
        return await self._thread.submit(self._run(call))

    def _is_generate(self, url: str) -> bool:
        parts = urlsplit(url)
        return parts.path.rstrip("/") == "/generate" and origin_of(url) in self._own

    async def _run(self, call: _Call) -> Any:
        base = str(call.payload.get("rid") or uuid.uuid4().hex) if call.tracked else ""
        attempt = 0
        while True:
            rid = base if attempt == 0 else f"{base}.{attempt}"
            try:
                async with self._tracking(rid if call.tracked else "", call.scope):
                    return await self._once(call, rid)
            except _Passing as trouble:
                attempt += 1
                self.retries += 1
                wait_s = backoff_s(attempt) * random.uniform(0.5, 1.0)  # noqa: S311
                is_last = attempt > call.max_retries and not self._waits_for_restart(call, trouble)
                if is_last or time.monotonic() + wait_s > call.deadline:
                    raise _failed(call, attempt, trouble) from trouble.__cause__
                if attempt in (1, 10):
                    logger.warning("%s %s: %s; trying again", call.method, call.url, trouble)
                await asyncio.sleep(wait_s)

    def _waits_for_restart(self, call: _Call, trouble: _Passing) -> bool:
        """Nobody is there, or a router says that nobody is: somebody will be. Who answers, and fails, is there."""
        absent = trouble.status in _ABSENT
        return absent and call.max_retries >= DEFAULT_RETRIES and origin_of(call.url) in self._restarted

    @asynccontextmanager
    async def _tracking(self, rid: str, scope: str) -> AsyncIterator[None]:
        """Keeps the id while the request is under way, and beyond if its connection was lost: the engine goes on."""
        if not rid:
            yield
            return
        with self._lock:
            self._in_flight[rid] = scope
        lost = False
        self.generating.begin()
        try:
            yield
        except _Passing as trouble:
            lost = trouble.may_run
            raise
        except asyncio.CancelledError:
            lost = True
            raise
        finally:
            self.generating.end()
            if not lost:
                with self._lock:
                    self._in_flight.pop(rid, None)

    async def _once(self, call: _Call, rid: str) -> Any:
        payload = {**call.payload, "rid": rid} if call.tracked else call.payload
        headers, url = dict(call.headers), self._where(call.url)
        key = self._keys.get(origin_of(url))
        if key and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {key}"
        left_s = max(0.001, call.deadline - time.monotonic())
        timeout = aiohttp.ClientTimeout(total=left_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._get_session().request(
                call.method, url, json=payload, headers=headers, timeout=timeout
            ) as response:
                body = await response.read()
                return _answer(call, response.status, body)
        except aiohttp.ClientConnectorError as error:
            raise _Passing(f"cannot connect: {error}", may_run=False) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise _Passing(f"{type(error).__name__}: {error}", may_run=True) from error

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
            # Loopback and cluster addresses: a proxy of the environment must not see them.
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False, json_serialize=json.dumps)
        return self._session

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that makes requests on the client's loop, and wait for it on this thread."""
        return self._thread.run(coroutine)

    def close(self) -> None:
        """End all requests and the thread."""
        if self._session is not None:
            self._thread.run(self._session.close(), timeout_s=5.0)
        self._thread.stop()


@dataclass(frozen=True)
class _Call:
    """One request as it was asked for. ``deadline`` is of the monotonic clock."""

    method: str
    url: str
    payload: Any
    headers: dict[str, str]
    max_retries: int
    deadline: float
    scope: str
    tracked: bool


class _Passing(Exception):
    """Worth another try. ``may_run``: the other side may be working on the request. ``status``: of its answer; 0: there
    was none."""

    def __init__(self, text: str, *, may_run: bool, status: int = 0) -> None:
        super().__init__(text)
        self.may_run = may_run
        self.status = status


def backoff_s(attempt: int) -> float:
    """How long to wait at most after so many attempts, however many they are."""
    return min(MAX_BACKOFF_S, 0.05 * float(2 ** min(attempt, 16)))


def _answer(call: _Call, status: int, body: bytes) -> Any:
    if status in RETRIED_STATUS:
        said = f"HTTP {status}: {body[:300].decode(errors='replace')}"
        raise _Passing(said, may_run=status in (408, 504), status=status)
    text = body.decode(errors="replace")
    if status >= 400:
        raise RequestRefused(
            f"{call.method} {call.url} was refused",
            evidence=f"HTTP {status}: {text[:1000]}",
            advice="Change the request, or the flags that it is made from.",
            status=status,
        )
    try:
        return json.loads(text)
    except ValueError:
        return text


def _failed(call: _Call, attempts: int, trouble: _Passing) -> RequestFailed:
    return RequestFailed(
        f"{call.method} {call.url} got no answer",
        evidence=f"{attempts} attempts; the last: {trouble}",
        advice="Look at the log of the process behind that address.",
        url=call.url,
        status=trouble.status,
    )


def origin_of(url: str) -> str:
    """``host:port`` of an address."""
    return urlsplit(url).netloc.lower()


_client: HttpClient | None = None
_client_lock = threading.Lock()


def http_client() -> HttpClient:
    """The client of this process, made on first use."""
    global _client
    with _client_lock:
        if _client is None:
            _client = HttpClient()
        return _client


def init_http_client(args: Any = None) -> None:
    """Make the client now; it is made on first use otherwise."""
    http_client()


def close_http_client() -> None:
    """End the client's thread, connections and requests."""
    global _client
    with _client_lock:
        client, _client = _client, None
    if client is not None:
        client.close()


async def post(
    url: str, payload: Any, max_retries: int = DEFAULT_RETRIES, headers: dict[str, str] | None = None
) -> Any:
    """POST JSON; the answer parsed if it is JSON, else as text. See ``HttpClient.request``."""
    return await http_client().request("POST", url, payload, max_retries=max_retries, headers=headers)


async def get(url: str, max_retries: int = DEFAULT_RETRIES, headers: dict[str, str] | None = None) -> Any:
    """GET; see ``post``."""
    return await http_client().request("GET", url, max_retries=max_retries, headers=headers)


def find_available_port(base_port: int) -> int:
    """The first free port from ``base_port`` on."""
    return get_free_port(base_port)
