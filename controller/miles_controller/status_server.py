"""The status page of a run: what the controller sees, as JSON, for the person who started the run and nobody else.

Consumes a function that describes the run as plain data, and functions that carry out orders (``run_orders``).
Produces ``/status`` and ``/healthz`` for GET and the orders for POST, on loopback, and the file ``status.json`` (mode
0600) in the run's runtime directory, from which ``miles status`` takes address and token.
Invariant: the file exists exactly while the server answers, unless the process was killed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from miles_agents.errors import MilesError
from miles_controller.http_server import DEFAULT_LIMITS, Action, HttpLimits, HttpResponse, HttpServer

STATUS_FILE = "status.json"
"""Its name in the runtime directory. Keys: ``run_id``, ``url``, ``token``, ``pid``; ``run_dir``, null for a
run without one; ``began``, seconds since the epoch."""

Order: TypeAlias = Callable[[Mapping[str, str]], Awaitable[Mapping[str, Any]]]
"""Given the query of a POST, carries an order out and returns plain values. What it raises of ours is told."""

_JSON = "application/json"


class StatusServer:
    """Serves ``/status`` (the snapshot) and ``/healthz``; both want the token.

    Args:
        snapshot: Describes the run now, in plain values; called on the event loop for each request. Values that
            JSON does not have become strings (paths, enums, nan).
        run_id: Told in the file and by ``/healthz``.
        directory: The run's runtime directory (private to the user).
        orders: By path. What one raises is answered with 409, as ``{"what", "evidence", "advice", "code"}``.
        about: Further keys of the file.
        host: Address to listen on.
        port: 0 takes a free one.
        allowed_hosts: Further names that clients may call this server by.
        limits: What one client may take.
    """

    def __init__(
        self,
        snapshot: Callable[[], Mapping[str, Any]],
        *,
        run_id: str,
        directory: Path,
        orders: Mapping[str, Order] | None = None,
        about: Mapping[str, Any] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        allowed_hosts: Collection[str] = (),
        limits: HttpLimits = DEFAULT_LIMITS,
    ) -> None:
        self._snapshot = snapshot
        self._run_id = run_id
        self._about = dict(about or {})
        self._file = directory / STATUS_FILE
        self._token = secrets.token_urlsafe(32)
        self._http = HttpServer(
            {"/status": self._status, "/healthz": self._healthz},
            token=self._token,
            actions={path: _answering(order) for path, order in (orders or {}).items()},
            host=host,
            port=port,
            allowed_hosts=allowed_hosts,
            limits=limits,
        )

    async def __aenter__(self) -> StatusServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """``http://host:port``; complete after ``start``."""
        return self._http.url

    @property
    def token(self) -> str:
        """The bearer token. Keep it out of logs and command lines."""
        return self._token

    async def start(self) -> None:
        """Listen, then write the file.

        Raises:
            CannotListen: No such address, or the port is taken.
            OSError: The directory is gone or full.
        """
        await self._http.start()
        about = {"run_id": self._run_id, "url": self.url, "token": self._token, "pid": os.getpid(), **self._about}
        try:
            _write_private(self._file, json.dumps(about) + "\n")
        except BaseException:
            await self._http.close()
            raise

    async def close(self) -> None:
        """Remove the file, drop all clients. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()
        await self._http.close()

    def _status(self) -> HttpResponse:
        return 200, _JSON, to_json(self._snapshot())

    def _healthz(self) -> HttpResponse:
        return 200, _JSON, to_json({"ok": True, "run_id": self._run_id})


def _plain(error: MilesError) -> dict[str, str]:
    return {"what": error.what, "evidence": error.evidence, "advice": error.advice, "code": error.code}


def _answering(order: Order) -> Action:
    async def answer(query: Mapping[str, str]) -> HttpResponse:
        try:
            return 200, _JSON, to_json(await order(query))
        except MilesError as error:
            return 409, _JSON, to_json(_plain(error))

    return answer


def to_json(value: Any) -> bytes:
    """JSON of plain data; what JSON does not have becomes a string. A status page must not fail on a nan loss."""
    try:
        text = json.dumps(value, default=str, allow_nan=False)
    except (TypeError, ValueError):  # a nan, or a key that is no string
        text = json.dumps(_tamed(value), default=str)
    return text.encode()


def _tamed(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _tamed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tamed(item) for item in value]
    return value


def _write_private(path: Path, text: str) -> None:
    """Write a 0600 file in one step, so that a reader never meets half of it."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
    draft.rename(path)
