"""The actor host: runs the requests that come for one actor, each where its endpoint says.

Consumes: CALL, CANCEL and CREDIT envelopes, on the I/O loop. Produces: answers, exactly one end per request. Waits
for: the thread that runs a request; a generator's consumer. What unblocks it: the end of the request, cancellation,
credit. Invariants: main-thread requests run one at a time in the order they came; nothing of the actor is decoded,
run or encoded on the I/O loop unless its endpoint says ``thread="io"``; a request that was cancelled or expired
before its turn never runs; whatever user code does to its own threads, this loop goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError as FutureCancelled
from typing import Any, Protocol

from miles_agents.errors import MilesError
from miles_agents.rpc.actor import Actor, EndpointInfo
from miles_agents.rpc.context import ActorContext, CallContext, actor_variable, call_variable
from miles_agents.rpc.errors import NoSuchActor
from miles_agents.rpc.errors_made import call_cancelled, expired, needs_a_stream
from miles_agents.rpc.inbox import Cancelling, Claim, Inbox, Request, Stage
from miles_agents.rpc.inflight import RequestKey
from miles_agents.rpc.mesh import no_such_endpoint
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.streams import Credits, StreamStopped
from miles_agents.wire import envelope as wire
from miles_agents.wire.codec import decode
from miles_agents.wire.envelope import Envelope, Target

logger = logging.getLogger(__name__)
_tuple = tuple.__new__


class Executors(Protocol):
    """Where endpoints run, apart from the I/O loop."""

    def submit_main(self, job: Callable[[], None]) -> None:
        """Run on the main thread, after everything submitted before."""

    def async_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the async thread; started on first use."""


class ActorHost:
    """Hosts one actor. ``table`` maps endpoint names to their declarations; it may grow until ``ready``."""

    def __init__(self, node: RpcNode, executors: Executors) -> None:
        self.node = node
        self.inbox = Inbox()
        self.actor: Actor | None = None
        self.context: ActorContext | None = None
        self.table: dict[str, EndpointInfo] = {}
        self.main_progress = 0
        self._bound: dict[str, Callable[..., Any]] = {}
        self._executors = executors
        self._credits: dict[RequestKey, Credits] = {}
        self._group_locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        node.host = self

    def bind(self, info: EndpointInfo, function: Callable[..., Any]) -> None:
        """Make a function callable from afar."""
        self.table[info.name] = info
        self._bound[info.name] = function

    def serve(self, actor: Actor, endpoints: dict[str, EndpointInfo]) -> None:
        """Make an actor's endpoints callable."""
        self.actor = actor
        for name, info in endpoints.items():
            self.bind(info, getattr(actor, name))

    def close(self) -> None:
        """End the async endpoints that run: the actor's process is over (where it was one of its own)."""
        for task in list(self._tasks):
            task.cancel()

    # -- on the I/O loop -------------------------------------------------------------------------------------

    def deliver(self, envelope: Envelope) -> None:
        """A message for this actor came."""
        key = _tuple(RequestKey, (envelope.source, envelope.rid))
        if envelope.kind == wire.CALL:
            self._take(key, envelope)
        elif envelope.kind == wire.CANCEL:
            self._cancel(key, envelope)
        elif envelope.kind == wire.CREDIT:
            credit = self._credits.get(key)
            if credit is not None:
                credit.grant(envelope.size)

    def _take(self, key: RequestKey, envelope: Envelope) -> None:
        info = self.table.get(envelope.method)
        if info is None:
            names = [name for name in self.table if not name.startswith("__")]
            self.node.answer_error(envelope, no_such_endpoint(self.node.label, envelope.method, names))
            return
        if info.is_generator and not envelope.flags & wire.STREAM:
            self.node.answer_error(envelope, needs_a_stream(self.node.label, info.name))
            return
        request = Request(key, envelope, envelope.target, info, self.node.loop.time())
        if not self.inbox.add(request):
            return
        if info.is_generator:
            self._credits[key] = Credits()
        if info.thread == "main":
            self._executors.submit_main(lambda: self._run_main(request))
        elif not info.is_async:
            self._run_sync(request)
        else:
            self._spawn(request, self.node.loop if info.thread == "io" else self._executors.async_loop())

    def _cancel(self, key: RequestKey, envelope: Envelope) -> None:
        outcome, request = self.inbox.cancel(key)
        if request is None:
            return
        if outcome is Cancelling.DROPPED:
            self._credits.pop(key, None)
            self._refuse(request, call_cancelled(request.endpoint.name, self.node.label, may_have_run=False))
            return
        credit = self._credits.get(key)
        if credit is not None:
            credit.stop()
        interrupt = request.interrupt  # the thread that runs it takes it away at the end
        if interrupt is not None:
            interrupt()
        elif credit is None and self.inbox.over(request):
            # A sync endpoint cannot be interrupted: its caller is let go, its result will be dropped.
            self._refuse(request, call_cancelled(request.endpoint.name, self.node.label, may_have_run=True))

    def _spawn(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        if loop is self.node.loop:
            self._start_task(request, loop)
        else:
            loop.call_soon_threadsafe(self._start_task, request, loop)

    # -- on the loop that runs an async endpoint -------------------------------------------------------------

    def _start_task(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        task = loop.create_task(self._run_async(request), name=f"endpoint {request.endpoint.name}")
        request.interrupt = lambda: loop.call_soon_threadsafe(task.cancel)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_async(self, request: Request) -> None:
        info = request.endpoint
        try:
            if info.group is None:
                await self._run_claimed(request)
            else:
                async with self._group_locks.setdefault((info.thread, info.group), asyncio.Lock()):
                    await self._run_claimed(request)
        except asyncio.CancelledError:
            self._fail(request, call_cancelled(info.name, self.node.label, may_have_run=True))

    async def _run_claimed(self, request: Request) -> None:
        if not self._may_run(request):
            return
        self._enter(request)
        try:
            args, kwargs = self._arguments(request)
            result = self._bound[request.endpoint.name](*args, **kwargs)
            if request.endpoint.is_generator:
                await self._pump_async(request, result)
            else:
                self._succeed(request, await result)
        except (StreamStopped, FutureCancelled):
            self._fail(request, call_cancelled(request.endpoint.name, self.node.label, may_have_run=True))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - the boundary of user code: all of it goes to the caller
            self._fail(request, error)

    async def _pump_async(self, request: Request, items: AsyncIterator[Any]) -> None:
        credit = self._credits.setdefault(request.key, Credits())
        try:
            await credit.take_async()  # before the item is made, so that no work is done too far ahead
            async for item in items:
                self.node.answer(request.envelope, wire.ITEM, item)
                await credit.take_async()
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
        self._end_stream(request)

    # -- on the thread that runs a sync endpoint -------------------------------------------------------------

    def _run_main(self, request: Request) -> None:
        self.main_progress += 1
        self._run_sync(request)
        self.main_progress += 1

    def _run_sync(self, request: Request) -> None:
        if not self._may_run(request):
            return
        actor_token, call_token = self._enter(request)
        try:
            args, kwargs = self._arguments(request)
            result = self._bound[request.endpoint.name](*args, **kwargs)
            if request.endpoint.is_generator:
                self._pump(request, result)
            else:
                self._succeed(request, result)
        except StreamStopped:
            self._fail(request, call_cancelled(request.endpoint.name, self.node.label, may_have_run=True))
        except BaseException as error:  # noqa: BLE001 - the boundary of user code: all of it goes to the caller
            self._fail(request, error)
        finally:
            call_variable.reset(call_token)
            actor_variable.reset(actor_token)

    def _pump(self, request: Request, items: Iterator[Any]) -> None:
        credit = self._credits.setdefault(request.key, Credits())
        try:
            credit.take()  # before the item is made, so that no work is done too far ahead
            for item in items:
                self.node.answer(request.envelope, wire.ITEM, item)
                credit.take()
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        self._end_stream(request)

    # -- shared by all threads -------------------------------------------------------------------------------

    def _may_run(self, request: Request) -> bool:
        claim = self.inbox.claim(request, self.node.loop.time())
        if claim is Claim.RUN:
            if request.envelope.flags & wire.ONE_WAY:
                self.node.answer(request.envelope, wire.STARTED)
            return True
        if claim is Claim.EXPIRED and self.inbox.over(request):
            self._refuse(request, expired(request, self.node))
        self._credits.pop(request.key, None)
        return False

    def _enter(self, request: Request) -> tuple[Any, Any]:
        envelope = request.envelope
        call = CallContext(
            self.node,
            envelope.source,
            envelope.rid,
            request.endpoint.name,
            request.target.position,
            envelope.size,
            envelope.deadline,
            envelope.trace,
            lambda: request.cancelled,
            lambda: request.stage is Stage.OVER and not request.cancelled,
        )
        return actor_variable.set(self.context), call_variable.set(call)

    def _arguments(self, request: Request) -> tuple[list[Any], dict[str, Any]]:
        envelope = request.envelope
        args, kwargs = decode(envelope.body, envelope.buffers, libraries=self.node.libraries)
        return args, kwargs

    def _succeed(self, request: Request, result: Any) -> None:
        if request.envelope.flags & wire.ONE_WAY:
            self.inbox.over(request)
            return
        if request.cancelled:
            self._fail(request, call_cancelled(request.endpoint.name, self.node.label, may_have_run=True))
            return
        reply = self.node.answer_to(request.envelope, wire.REPLY, result)  # may refuse: then the request is still open
        if self.inbox.over(request):
            self.node.send(reply, at_once=not len(self.inbox))  # with more to do, answers go in batches

    def _end_stream(self, request: Request) -> None:
        self._credits.pop(request.key, None)
        if self.inbox.over(request):
            self.node.answer(request.envelope, wire.END)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._credits.pop(request.key, None)
        was_open = self.inbox.over(request)
        if request.envelope.flags & wire.ONE_WAY:
            logger.error("%s.%s failed; nobody waits for it", self.node.label, request.endpoint.name, exc_info=error)
            return
        if not was_open:
            return
        elapsed_s = self.node.loop.time() - request.arrived_at
        self.node.answer_error(request.envelope, error, elapsed_s=elapsed_s)

    def _refuse(self, request: Request, error: MilesError) -> None:
        if not request.envelope.flags & wire.ONE_WAY or request.stage.value != "running":
            self.node.answer_error(request.envelope, error)


def no_actor(envelope: Envelope, target: Target, label: str, why: str) -> NoSuchActor:
    """The answer for a receiver that nobody here knows."""
    return NoSuchActor(
        f"{envelope.method or wire.KIND_NAMES[envelope.kind]} for rank {target.rank} of mesh {envelope.mesh}"
        f" (incarnation {target.incarnation}) reached {label}, which knows no such actor",
        evidence=why,
        advice="Get a fresh handle with lookup(name).",
        may_have_run=False,
    )
