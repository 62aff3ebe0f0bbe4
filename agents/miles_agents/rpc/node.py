"""The RPC node of a process: makes its calls, receives their answers, hands incoming requests to its host.

Consumes: calls from any thread of the process; envelopes that the link delivers. Produces: envelopes for the link
(``route``), results for futures and streams. Waits for: answers, until their deadline, the death of the callee (which
the hop in front of the callee answers), cancellation, or ``close``. Invariants: all bookkeeping happens on one event
loop; what other threads want is posted to it in order; every call that was begun ends.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import os
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from miles_agents.errors import MilesError
from miles_agents.rpc.calls import CallTable, OpenCall, Sink, Window
from miles_agents.rpc.context import find_call
from miles_agents.rpc.errors_made import (
    cancelled_here,
    deadline_exceeded,
    hosts_nothing,
    indescribable,
    naming_the_argument,
    window_full,
)
from miles_agents.wire import envelope as wire
from miles_agents.wire.codec import CannotTravel, MalformedBody, decode, encode, encode_call, own_buffers
from miles_agents.wire.envelope import Address, Envelope, Target
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.remote_error import Origin, describe_exception, rebuild_exception

logger = logging.getLogger(__name__)
Libraries = Literal["import", "opaque"]
_HOST = socket.gethostname()
MAX_WINDOWS = 1000
"""With so many, those with nothing open are dropped: meshes come and go, their numbers never return."""


class Host(Protocol):
    """What runs incoming requests."""

    def deliver(self, envelope: Envelope) -> None:
        """A CALL, CANCEL or CREDIT for this process."""


class RpcNode:
    """One process's end of all its conversations. Create it on the event loop that owns it."""

    def __init__(
        self,
        address: Address,
        label: str,
        route: Callable[[Envelope], None],
        *,
        libraries: Libraries = "opaque",
        routes_from_any_thread: bool = False,
    ) -> None:
        self.address = address
        self.label = label
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.libraries = libraries
        self.host: Host | None = None
        self.calls = CallTable()
        self._route = route
        self._routes_from_any_thread = routes_from_any_thread
        self._windows: dict[tuple[int, str], Window] = {}
        self._held: dict[int, Envelope] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._rids = itertools.count(1)
        self._ready: deque[int] = deque()  # held calls that there is room for, being sent in order
        self._posted: deque[Callable[[], None]] = deque()
        self._posting = threading.RLock()  # what a garbage collection in it drops may post, too
        self._post_scheduled = False
        self._closed: MilesError | None = None

    # -- from any thread -------------------------------------------------------------------------------------

    def begin(
        self,
        mesh: int,
        targets: Sequence[Target],
        method: str,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        sink: Sink,
        *,
        flags: int = 0,
        timeout_s: float | None = None,
        lane: str = "main",
    ) -> int:
        """Begin a call: it is under way when this returns. Returns its request id.

        Order is kept, and the window is shared, per mesh and ``lane``.

        Raises:
            CannotTravel: an argument has no form on the wire; says which.
            WindowFull: the callee has not answered so much that no more is taken.
        """
        args, kwargs = arguments
        try:
            body, buffers = encode_call(args, kwargs)
        except CannotTravel as error:
            raise naming_the_argument(args, kwargs) or error from None
        rid = next(self._rids)
        context = find_call()
        now = self.loop.time()
        deadline = None if timeout_s is None else now + timeout_s
        if context is not None:
            trace = context.trace
            if context.deadline is not None:
                deadline = context.deadline if deadline is None else min(deadline, context.deadline)
        else:
            trace = random.getrandbits(63)
        count = len(targets)
        flat = tuple(targets[0]) if count == 1 else _flat(targets)
        envelope = Envelope(
            wire.CALL, rid, self.address, mesh, flat, count, method, deadline, flags, trace, body, list(buffers)
        )  # fmt: skip
        owing = {target.rank: target for target in targets}
        call = OpenCall(rid, mesh, method, owing, sink, now, envelope.num_bytes, lane=lane)
        if threading.get_ident() == self.thread and not self._posted:
            self._begin(call, envelope)
        else:
            self.post(lambda: self._begin(call, envelope))
        return rid

    def cancel(self, rid: int, *, wait: bool) -> None:
        """Ask the receivers to stop. ``wait``: the call ends when they confirm; else it ends now."""
        self.post(lambda: self._cancel(rid, wait=wait))

    def grant(self, rid: int, position: int, count: int) -> None:
        """The consumer of a stream took items."""
        self.post(lambda: self._grant(rid, position, count))

    def answer(self, request: Envelope, kind: int, value: Any = None) -> None:
        """Send an answer; the value is encoded on the calling thread. Raises CannotTravel."""
        self.send(self.answer_to(request, kind, value))

    def answer_to(self, request: Envelope, kind: int, value: Any = None) -> Envelope:
        """An answer to send, encoded on the calling thread. Raises CannotTravel.

        It owns its bytes: nothing holds an endpoint that was answered back from changing what it returned.
        """
        if kind not in (wire.REPLY, wire.ITEM):
            return request.answer(kind, self.address)
        body, buffers = encode(value, what="return value" if kind == wire.REPLY else "item")
        return request.answer(kind, self.address, body, list(own_buffers(buffers)) if buffers else [])

    def send(self, envelope: Envelope, *, at_once: bool = False) -> None:
        """Send an envelope on its way, after everything that this thread posted before.

        ``at_once``: from this very thread where the way allows it, which spares waking the loop; else the loop does
        it, together with what else is posted meanwhile.
        """
        is_here = threading.get_ident() == self.thread or (at_once and self._routes_from_any_thread)
        if is_here and not self._posted:
            self._route(envelope)
        else:
            self.post(lambda: self._route(envelope))

    def answer_error(
        self, request: Envelope, error: BaseException, *, source: Address | None = None, elapsed_s: float = 0.0
    ) -> None:
        """Answer a request with an exception; ``source`` where this node speaks for a receiver that cannot."""
        origin = self.origin(request.method, elapsed_s)
        try:
            description = describe_exception(error, origin, [])
        except Exception as trouble:  # noqa: BLE001 - boundary: a class of user code; its caller must be answered
            description = describe_exception(indescribable(error, trouble), origin, [])
        body, buffers = encode(description, what="error")
        self.send(request.answer(wire.ERROR, source or self.address, body, list(own_buffers(buffers))))

    def origin(self, method: str, elapsed_s: float) -> Origin:
        """Where an error of this process comes from."""
        return Origin(self.label, _HOST, os.getpid(), method, elapsed_s, self.address.incarnation)

    def post(self, action: Callable[[], None]) -> None:
        """Run on the loop: at once when already there, else in order of posting."""
        if threading.get_ident() == self.thread and not self._posted:
            action()
            return
        with self._posting:
            self._posted.append(action)
            if self._post_scheduled:
                return
            self._post_scheduled = True
        self.loop.call_soon_threadsafe(self._run_posted)

    # -- on the loop -----------------------------------------------------------------------------------------

    def deliver(self, envelope: Envelope) -> None:
        """An envelope for this process came."""
        kind = envelope.kind
        if kind in (wire.CALL, wire.CANCEL, wire.CREDIT):
            if self.host is not None:
                self.host.deliver(envelope)
            elif kind == wire.CALL:
                self.answer_error(envelope, hosts_nothing(envelope, self.label))
            return
        self._on_answer(envelope, envelope.source)

    def close(self, error: MilesError) -> None:
        """End every call with ``error``; calls that are begun later end the same way."""
        self._closed = error
        self._held.clear()  # what waits for room will not be sent any more
        for call in list(self.calls):
            self._ended(self.calls.fail(call.rid, copy.copy(error))[0])

    def _run_posted(self) -> None:
        with self._posting:
            self._post_scheduled = False
        while self._posted:
            try:
                self._posted[0]()
            except Exception:  # boundary: one action of many; those behind it belong to other calls
                logger.exception("%s: an action on the loop failed", self.label)
            finally:
                self._posted.popleft()

    def _begin(self, call: OpenCall, envelope: Envelope) -> None:
        self.calls.open(call)
        if self._closed is not None:
            self.calls.fail(call.rid, copy.copy(self._closed))
            return
        window = self._window_of(call)
        if window.is_overfull(call.num_bytes):
            self.calls.fail(call.rid, window_full(call, window))
            return
        if envelope.deadline is not None:
            if envelope.deadline <= self.loop.time():
                self.calls.fail(call.rid, deadline_exceeded(call, 0.0, was_sent=False))
                return
            self._deadlines[call.rid] = self.loop.call_at(envelope.deadline, self._expire, call.rid)
        may_go = window.admit(call.rid, call.num_bytes)
        if may_go and not self._ready:
            self._launch(envelope)
            return
        self._held[call.rid] = envelope
        if may_go:
            self._ready.append(call.rid)

    def _window_of(self, call: OpenCall) -> Window:
        key = (call.mesh, call.lane)
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= MAX_WINDOWS:
                self._windows = {other: kept for other, kept in self._windows.items() if not kept.is_idle}
            window = self._windows[key] = Window()
        return window

    def _launch(self, envelope: Envelope) -> None:
        """Send a call; one that no peer would take fails here, and not by its deadline."""
        try:
            self._route(envelope)
        except UnsendableMessage as error:
            self._ended(self.calls.fail(envelope.rid, error)[0])

    def _on_answer(self, envelope: Envelope, source: Address) -> None:
        rid, kind = envelope.rid, envelope.kind
        if not self.calls.is_owed(rid, source):
            return
        if kind == wire.REPLY:
            try:
                value = decode(envelope.body, envelope.buffers, libraries=self.libraries)
            except MilesError as error:
                self._on_error(rid, source, error)
            else:
                self._ended(self.calls.value(rid, source, value))
        elif kind == wire.STARTED:
            self._ended(self.calls.value(rid, source, None))
        elif kind == wire.ERROR:
            self._on_error(rid, source, self._rebuilt(envelope))
        elif kind == wire.ITEM:
            value = self._decoded(envelope)
            if isinstance(value, _Failed):
                self._on_error(rid, source, value.error)
            else:
                self.calls.item(rid, source, value)
        elif kind == wire.END:
            self._ended(self.calls.end(rid, source))

    def _decoded(self, envelope: Envelope) -> Any:
        try:
            return decode(envelope.body, envelope.buffers, libraries=self.libraries)
        except MilesError as error:
            return _Failed(error)

    def _rebuilt(self, envelope: Envelope) -> BaseException:
        described = self._decoded(envelope)
        if isinstance(described, _Failed):
            return described.error
        try:
            return rebuild_exception(described)
        except Exception as error:  # noqa: BLE001 - boundary: words of another process; the call has to end
            return MalformedBody(
                "an error came that cannot be rebuilt here",
                evidence=f"{type(error).__name__}: {error}; it was described as {described!r:.1000}",
                advice="Start all processes of a run from the same version of the code; if they are, report this.",
            )

    def _on_error(self, rid: int, source: Address, error: BaseException) -> None:
        call, stop = self.calls.error(rid, source, error)
        if call is not None:
            self._tell(wire.CANCEL, call, stop)
        self._ended(call)

    def _expire(self, rid: int) -> None:
        call = self.calls.get(rid)
        if call is None:
            return
        was_sent = rid not in self._held
        error = deadline_exceeded(call, self.loop.time() - call.started_at, was_sent=was_sent)
        ended, stop = self.calls.fail(rid, error)
        if was_sent:
            self._tell(wire.CANCEL, call, stop)
        self._ended(ended)

    def _cancel(self, rid: int, *, wait: bool) -> None:
        call = self.calls.get(rid)
        if call is None:
            return
        was_sent = rid not in self._held
        if wait and was_sent:
            self._tell(wire.CANCEL, call, self.calls.cancel(rid))
            return
        ended, stop = self.calls.fail(rid, cancelled_here(call, was_sent=was_sent))
        if was_sent:
            self._tell(wire.CANCEL, call, stop)
        self._ended(ended)

    def _grant(self, rid: int, position: int, count: int) -> None:
        call = self.calls.get(rid)
        if call is not None:
            receivers = [target for target in call.owing.values() if target.position == position]
            self._tell(wire.CREDIT, call, receivers, size=count)

    def _tell(self, kind: int, call: OpenCall, receivers: Sequence[Target], *, size: int = 1) -> None:
        if receivers:
            self._route(Envelope(kind, call.rid, self.address, call.mesh, _flat(receivers), size, call.method))

    def _ended(self, call: OpenCall | None) -> None:
        if call is None:
            return
        if self._deadlines:
            timer = self._deadlines.pop(call.rid, None)
            if timer is not None:
                timer.cancel()
        if self._held:
            self._held.pop(call.rid, None)
        window = self._windows[call.mesh, call.lane]
        ready = window.leave(call.rid, call.num_bytes)
        if ready:
            was_idle = not self._ready
            self._ready += ready
            if was_idle:
                self._release()

    def _release(self) -> None:
        # Sending may end calls at once and make more ready: they queue behind, so that order holds and no stack grows.
        while self._ready:
            held = self._held.pop(self._ready[0], None)
            try:
                if held is not None:
                    self._launch(held)
            finally:
                self._ready.popleft()


def _flat(targets: Sequence[Target]) -> tuple[int, ...]:
    return tuple(targets[0]) if len(targets) == 1 else tuple(itertools.chain.from_iterable(targets))


class _Failed:
    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error
