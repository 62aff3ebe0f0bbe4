"""HTTP with all engines of an update at once, from the trainer's main thread. Standard library only.

Invariants: one request at a time per engine, over one connection; an engine that failed once is not spoken to again in
this update, and ``failures`` says why.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from miles.backends.weight_update.connections import Connections, Refused
from miles.backends.weight_update.failures import EnginesMissedUpdate
from miles.backends.weight_update.messages import EngineTarget

CALL_S = 600.0
TELL_S = 10.0
"""Deadline of what is said to engines that may be gone: whoever is well answers at once."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Requests that are under way, one per engine."""

    futures: Mapping[str, Future[float]]

    @property
    def done(self) -> list[str]:
        """Engines whose request is over, whichever way."""
        return [name for name, future in self.futures.items() if future.done()]

    @property
    def failed(self) -> list[str]:
        """Engines whose request has already ended with an error."""
        return [name for name in self.done if self.futures[name].exception() is not None]

    @property
    def gone(self) -> list[str]:
        """Engines whose request has ended without an answer."""
        return [name for name in self.failed if not isinstance(self.futures[name].exception(), Refused)]

    @property
    def has_failed(self) -> bool:
        """Whether one has already ended with an error."""
        return bool(self.failed)


class EngineCalls:
    """The engines of one update. A context manager: waits for all requests, and closes its connections, unless they
    are the caller's (``connections``)."""

    def __init__(
        self, engines: tuple[EngineTarget, ...], *, timeout_s: float = CALL_S, connections: Connections | None = None
    ) -> None:
        self.engines = engines
        self.failures: dict[str, str] = {}
        self.busy_s = 0.0
        self._timeout_s = timeout_s
        self._connections = connections or Connections()
        self._are_own = connections is None
        self._connections.keep_only(engine.url for engine in engines)
        self._posted: list[Future[float]] = []

    def __enter__(self) -> EngineCalls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See the class."""
        wait(self._posted)
        if self._are_own:
            self._connections.close()

    @property
    def alive(self) -> tuple[EngineTarget, ...]:
        """Engines that have not failed."""
        return tuple(engine for engine in self.engines if engine.name not in self.failures)

    def start(
        self, path: str, body: Callable[[EngineTarget], Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Pending:
        """POST to every engine that has not failed. ``timeout_s``: another deadline than that of all requests."""
        return Pending({engine.name: self._post(engine, path, body(engine), timeout_s) for engine in self.alive})

    def end_late(self, pending: Pending, names: Iterable[str], within_s: float) -> None:
        """Wait so long for these engines' answers; requests that have none then end with an error."""
        futures = {name: pending.futures[name] for name in names}
        urls = {engine.name: engine.url for engine in self.engines}
        wait(futures.values(), timeout=within_s)
        for name in [name for name, future in futures.items() if not future.done()]:
            self.failures.setdefault(name, f"its request was not answered within {within_s:g} s after the last word")
            self._connections.cut(urls[name])

    def finish(self, pending: Pending | None) -> float:
        """Wait for the answers. Returns the longest request's seconds; failures go to ``failures``."""
        longest = 0.0
        for name, future in (pending.futures if pending is not None else {}).items():
            try:
                longest = max(longest, future.result())
            except (OSError, http.client.HTTPException, Refused) as error:
                self.failures.setdefault(name, str(error) or type(error).__name__)
        self.busy_s += longest
        return longest

    def tell_all(self, path: str, body: Mapping[str, Any], *, names: Iterable[str] | None = None) -> None:
        """POST to every engine (with ``names``: to these), also if it has failed; it does not matter what comes of it,
        and nobody is waited for longer than ``TELL_S``.

        None of them may be answering a request.
        """
        wanted = self.engines if names is None else [engine for engine in self.engines if engine.name in set(names)]
        for future in [self._post(engine, path, body, TELL_S) for engine in wanted]:
            with contextlib.suppress(OSError, http.client.HTTPException, Refused):
                future.result()

    def raise_failures(self, doing: str, *, names: Sequence[str] = ()) -> None:
        """Raises EnginesMissedUpdate if any engine failed, or for these ``names`` if none said so."""
        failed = list(self.failures) or list(names)
        if failed:
            shown = ", ".join(failed)
            raise EnginesMissedUpdate(
                f"{shown} failed while {doing}",
                evidence="\n".join(f"{name}: {self.failures.get(name, 'no error was heard of')}" for name in failed),
                advice=f"Read the log of {shown}; the first error in it is usually the cause.",
                engines=failed,
            )

    def _post(self, engine: EngineTarget, path: str, body: Mapping[str, Any], timeout_s: float | None) -> Future[float]:
        timeout_s = timeout_s or self._timeout_s
        future = self._connections.post(engine, path, body, timeout_s, min(timeout_s, self._timeout_s))
        self._posted.append(future)
        return future
