"""The callee's bookkeeping: requests that came and are not over. Thread-safe; no I/O, no waiting.

Consumes: requests from the I/O loop; claims from the thread that is about to run one; cancellation; ends. Produces:
verdicts. Invariants: a request runs at most once; one that was cancelled or whose deadline passed before its turn
never runs; a request that is known is not taken a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from miles_agents.rpc.actor import EndpointInfo
from miles_agents.rpc.inflight import RequestKey
from miles_agents.wire.envelope import Envelope, Target


class Stage(Enum):
    """Where a request is."""

    QUEUED = "queued"
    RUNNING = "running"
    OVER = "over"


class Claim(Enum):
    """What a thread that wants to run a request is told."""

    RUN = "run"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Cancelling(Enum):
    """What became of a wish to cancel."""

    DROPPED = "dropped"  # it had not started and never will
    RUNNING = "running"  # it runs; whoever can stop it has been asked
    UNKNOWN = "unknown"  # it is over, or never came


@dataclass(slots=True)
class Request:
    """One request at its callee."""

    key: RequestKey
    envelope: Envelope
    target: Target
    endpoint: EndpointInfo
    arrived_at: float
    stage: Stage = Stage.QUEUED
    cancelled: bool = False
    interrupt: Callable[[], object] | None = None
    """Set while it runs somewhere that can be interrupted; called on the I/O loop."""


class Inbox:
    """Requests of one actor that are not over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[RequestKey, Request] = {}
        self.num_repeated = 0

    def __len__(self) -> int:
        return len(self._requests)

    def snapshot(self) -> list[Request]:
        """The requests that are not over, oldest first."""
        with self._lock:
            return list(self._requests.values())

    def add(self, request: Request) -> bool:
        """Take a request. False: it is known already, nothing is to be done."""
        with self._lock:
            if request.key in self._requests:
                self.num_repeated += 1
                return False
            self._requests[request.key] = request
            return True

    def claim(self, request: Request, now: float) -> Claim:
        """The request's turn has come."""
        with self._lock:
            if request.cancelled:
                return Claim.CANCELLED
            deadline = request.envelope.deadline
            if deadline is not None and now >= deadline:
                return Claim.EXPIRED
            request.stage = Stage.RUNNING
            return Claim.RUN

    def cancel(self, key: RequestKey) -> tuple[Cancelling, Request | None]:
        """The caller does not want the answer any more."""
        with self._lock:
            request = self._requests.get(key)
            if request is None:
                return Cancelling.UNKNOWN, None
            request.cancelled = True
            if request.stage is Stage.QUEUED:
                request.stage = Stage.OVER
                del self._requests[key]
                return Cancelling.DROPPED, request
            return Cancelling.RUNNING, request

    def over(self, request: Request) -> bool:
        """The request ended. False: its end was told before."""
        with self._lock:
            request.stage = Stage.OVER
            request.interrupt = None
            return self._requests.pop(request.key, None) is not None
