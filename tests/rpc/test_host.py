"""The actor host on real threads: where endpoints run, in what order, how they are cancelled, and what they survive."""

import asyncio
import gc
import logging
import threading
import weakref
from contextvars import copy_context

import numpy as np
import pytest
from support.wired import eventually, wired

from miles_agents.errors import MilesError, UserCodeError
from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.context import current_actor, current_call
from miles_agents.rpc.errors import CallCancelled, DeadlineExceeded, NotAnActorProcess, NotAnEndpoint, WouldDeadlock
from miles_agents.rpc.inflight import RequestKey
from miles_agents.wire import envelope as wire
from miles_agents.wire.codec import CannotTravel, encode, register_converter
from miles_agents.wire.envelope import Envelope
from miles_agents.wire.remote_error import RemoteError

WAIT_S = 30


class Worker(Actor):
    """Blocks, waits, fails and yields on request."""

    def __init__(self):
        self.seen = []
        self.ended = []
        self.release = threading.Event()
        self.overlap = self.most = 0

    @endpoint
    def echo(self, value=None):
        self.seen.append(value)
        return value

    @endpoint
    def thread_name(self):
        return threading.current_thread().name

    @endpoint
    async def async_thread_name(self):
        return threading.current_thread().name

    @endpoint(thread="io")
    def io_thread_name(self):
        return threading.current_thread().name

    @endpoint(thread="io")
    async def async_io_thread_name(self):
        return threading.current_thread().name

    @endpoint
    def block(self, name=None):
        self.seen.append(name)
        assert self.release.wait(WAIT_S)
        self.ended.append([name, current_call().is_cancelled()])
        return name

    @endpoint
    async def wait(self, name=None):
        await self.wait_here(name)

    @endpoint(thread="io")
    async def io_wait(self, name=None):
        await self.wait_here(name)

    async def wait_here(self, name):
        self.seen.append(name)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.ended.append([name, current_call().is_cancelled()])

    @endpoint
    async def stubborn(self):
        self.seen.append("stubborn")
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            return "I do not stop"

    @endpoint(thread="io")
    def let_go(self):
        self.release.set()

    @endpoint
    def numbers(self, count, fail_at=None):
        try:
            for number in range(count):
                if number == fail_at:
                    raise ValueError(number)
                self.seen.append(number)
                yield number
        finally:
            self.ended.append("numbers")

    @endpoint
    def give(self, what):
        if what == "object":
            return {"a": [1, object()]}
        if what == "exit":
            raise SystemExit(3)
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "unwilling":
            raise UnwillingError
        raise ValueError(what)

    @endpoint
    async def give_async(self, what):
        return self.give(what)

    @endpoint
    def bad_items(self):
        yield 1
        yield object()

    @endpoint
    def ask(self, other, value):
        return [other.echo.call_one(value).get(WAIT_S), *(item for item in other.numbers.call_one(40))]

    @endpoint(thread="io")
    def deadlock(self, other):
        return other.echo.call_one(1).get(WAIT_S)

    @endpoint
    def calls_from_threads(self, other, count):
        def call(name):
            futures = [other.echo.call_one([name, number]) for number in range(count)]
            for future in futures:
                future.get(WAIT_S)

        # Several actors share this process, so the threads have to be told which of them they belong to.
        threads = [threading.Thread(target=copy_context().run, args=(call, name)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)

    @endpoint
    def context_in_a_thread(self):
        found = []

        def look():
            try:
                found.append(current_call().method)
            except NotAnActorProcess:
                found.append("no call")

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(WAIT_S)
        return [*found, current_actor().mesh_name]

    @endpoint
    def slow_to_encode(self):
        self.seen.append(SlowToEncode(self.release))
        return self.seen[0]

    @endpoint
    def double(self, array):
        return array * 2


class UnwillingError(MilesError):
    """Can neither be described nor made from afar."""

    code = "E-TEST-001"

    def __init__(self): ...

    def __setattr__(self, name, value):
        raise OSError("no")


class SlowToEncode:
    """Holds up the thread that encodes it."""

    def __init__(self, release):
        self.encoding = threading.Event()
        self.release = release

    def to_plain(self):
        self.encoding.set()
        assert self.release.wait(WAIT_S)
        return 0


register_converter(SlowToEncode, "tests.slow", SlowToEncode.to_plain, lambda plain: plain)


async def test_endpoints_run_on_the_thread_that_they_name():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        assert await mesh.thread_name.call_one() == "main of actors[0]"
        assert await mesh.async_thread_name.call_one() == "async of actors[0]"
        assert await mesh.io_thread_name.call_one() == threading.current_thread().name
        assert await mesh.async_io_thread_name.call_one() == threading.current_thread().name


async def test_io_and_async_endpoints_answer_while_the_main_thread_is_blocked():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        blocked = mesh.block.call_one("b")
        await eventually(lambda: net.actor(mesh).seen)
        await mesh.async_thread_name.call_one()
        await mesh.io_thread_name.call_one()
        assert not blocked.done()
        await mesh.let_go.call_one()
        assert await blocked == "b"


async def test_a_queued_request_that_is_cancelled_never_runs():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        first, second, third = mesh.block.call_one(1), mesh.echo.call_one(2), mesh.echo.call_one(3)
        await eventually(lambda: net.actor(mesh).seen)
        second.cancel()
        with pytest.raises(CallCancelled) as caught:
            await second
        assert caught.value.fields["may_have_run"] is False
        net.actor(mesh).release.set()
        assert [await first, await third] == [1, 3]
        assert net.actor(mesh).seen == [1, 3]


async def test_a_running_sync_request_that_is_cancelled_lets_its_caller_go():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        future = mesh.block.call_one("x")
        await eventually(lambda: net.actor(mesh).seen)
        future.cancel()
        with pytest.raises(CallCancelled) as caught:
            await future
        assert caught.value.fields["may_have_run"] is True
        late = net.hub.calls.stats.late
        net.actor(mesh).release.set()
        assert await mesh.echo.call_one("after") == "after"
        assert net.actor(mesh).ended == [["x", True]]
        assert net.hub.calls.stats.late == late, "one end per request"


async def test_a_request_that_is_cancelled_while_its_result_is_encoded_has_one_end():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        future = mesh.slow_to_encode.call_one()
        await eventually(lambda: net.actor(mesh).seen and net.actor(mesh).seen[0].encoding.is_set())
        future.cancel()
        with pytest.raises(CallCancelled):
            await future
        await mesh.let_go.call_one()
        await mesh.thread_name.call_one()
        ends = [e.kind for e in net.sent if e.rid == net.sent[0].rid and e.kind in (wire.REPLY, wire.ERROR)]
        assert ends == [wire.ERROR]


@pytest.mark.parametrize("method", ["wait", "io_wait"])
async def test_a_running_async_request_that_is_cancelled_is_interrupted(method):
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        future = mesh.endpoint(method).call_one("x")
        await eventually(lambda: net.actor(mesh).seen)
        future.cancel()
        with pytest.raises(CallCancelled) as caught:
            await future
        assert caught.value.fields["may_have_run"] is True
        assert net.actor(mesh).ended == [["x", True]]
        assert len(net.host(mesh).inbox) == 0


async def test_an_async_request_that_swallows_its_cancellation_is_cancelled_all_the_same():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        future = mesh.stubborn.call_one()
        await eventually(lambda: net.actor(mesh).seen)
        future.cancel()
        with pytest.raises(CallCancelled):
            await future


async def test_a_request_whose_deadline_passes_in_the_queue_never_runs():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        first = mesh.block.call_one(1)
        with pytest.raises(DeadlineExceeded):
            await mesh.options(timeout_s=0.01).echo.call_one(2)
        # The caller's verdict reaches the callee as a cancellation; without it the callee finds out by itself.
        host, address = net.host(mesh), net.address(mesh)
        expired = Envelope(
            wire.CALL, 77, net.hub.address, address.mesh, (0, address.incarnation, 0), 1, "echo",
            net.loop.time(), body=b"\x92\x91\x03\x80",
        )  # fmt: skip
        host.deliver(expired)
        sent = len(net.sent)
        net.actor(mesh).release.set()
        assert await first == 1
        await eventually(lambda: len(host.inbox) == 0)
        assert net.actor(mesh).seen == [1]
        errors = [e for e in net.sent[sent:] if e.kind == wire.ERROR and e.rid == 77]
        assert b"was not started: its deadline had passed" in errors[0].body
        assert len(errors) == 1


async def test_a_request_that_comes_twice_runs_once():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        future = mesh.block.call_one("x")
        call = net.sent[0]
        net.host(mesh).deliver(call.to(call.receivers()))
        await eventually(lambda: net.host(mesh).inbox.num_repeated == 1)
        net.actor(mesh).release.set()
        assert await future == "x"
        assert await mesh.echo.call_one("y") == "y"
        assert net.actor(mesh).seen == ["x", "y"]


async def test_calls_of_one_sender_run_in_order_also_from_several_threads():
    async with wired() as net:
        caller, callee = net.spawn(Worker, threads=True), net.spawn(Worker, threads=True)
        await caller.calls_from_threads.call_one(callee, 100)
        seen = net.actor(callee).seen
        assert len(seen) == 400
        for name in range(4):
            assert [number for who, number in seen if who == name] == list(range(100))


async def test_sync_code_waits_for_calls_and_streams_on_its_own_thread():
    async with wired() as net:
        caller, callee = net.spawn(Worker, threads=True), net.spawn(Worker, threads=True)
        assert await caller.ask.call_one(callee, "v") == ["v", *range(40)]


async def test_waiting_on_the_io_thread_is_refused():
    async with wired() as net:
        caller, callee = net.spawn(Worker, threads=True), net.spawn(Worker, threads=True)
        with pytest.raises(WouldDeadlock, match="would wait for ever"):
            await caller.deadlock.call_one(callee)


async def test_a_sync_producer_stays_within_its_credit_and_stops_with_its_consumer():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        seen = net.actor(mesh).seen
        stream = mesh.numbers.call_one(1000)
        await eventually(lambda: len(seen) == 16)
        for taken in range(1, 40):
            await anext(stream)
            assert len(seen) <= taken + 16
        await stream.aclose()
        await eventually(lambda: net.actor(mesh).ended == ["numbers"])
        assert len(seen) <= 39 + 16
        assert await mesh.echo.call_one("free again") == "free again"


async def test_a_generator_that_fails_gives_its_items_first():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        stream = mesh.numbers.call_one(100, fail_at=3)
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="ValueError in actors"):
            await anext(stream)
        bad = mesh.bad_items.call_one()
        assert await anext(bad) == 1
        with pytest.raises(CannotTravel, match="item"):
            await anext(bad)
        assert net.host(mesh)._credits == {}


@pytest.mark.parametrize("method", ["give", "give_async"])
@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("object", CannotTravel, r"return value\['a'\]\[1\]"),
        ("exit", RemoteError, "SystemExit"),
        ("interrupt", RemoteError, "KeyboardInterrupt"),
        ("plain", ValueError, "plain"),
        ("unwilling", UserCodeError, "UnwillingError, which cannot be described"),
    ],
)
async def test_whatever_an_endpoint_raises_or_returns_is_answered_and_the_process_lives(method, what, kind, text):
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        with pytest.raises(kind, match=text):
            await mesh.endpoint(method).call_one(what)
        assert await mesh.echo.call_one("alive") == "alive"
        assert await mesh.async_thread_name.call_one() == "async of actors[0]"


async def test_an_error_that_cannot_be_rebuilt_ends_its_call_all_the_same():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        future = mesh.block.call_one()
        body, _ = encode({"miles": {"lineage": [[UnwillingError.__module__, "UnwillingError"]]}})
        net.hub.deliver(net.sent[0].answer(wire.ERROR, net.address(mesh), body))
        with pytest.raises(MilesError, match="an error came that cannot be rebuilt here"):
            await future
        net.actor(mesh).release.set()


async def test_a_one_way_request_that_fails_is_logged_where_it_ran(caplog):
    caplog.set_level(logging.ERROR)
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        await mesh.give.broadcast("lost")
        await eventually(lambda: "actors[0].give failed; nobody waits for it" in caplog.text)
        assert "ValueError: lost" in caplog.text
        assert len(net.host(mesh).inbox) == 0


async def test_wrong_arguments_are_the_callers_error_and_name_the_endpoint():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        with pytest.raises(TypeError, match=r"echo\(\) got an unexpected keyword argument 'no'"):
            await mesh.echo.call_one(no=1)


async def test_an_unknown_endpoint_names_the_nearest_at_the_callee():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        mesh._info.endpoints.clear()
        with pytest.raises(NotAnEndpoint, match=r"actors\[0\] has no endpoint 'ecko'") as caught:
            await mesh.ecko.call_one(1)
        assert caught.value.advice == "Did you mean 'echo'?"


async def test_a_thread_of_user_code_belongs_to_no_call():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True, name="trainers")
        assert await mesh.context_in_a_thread.call_one() == ["no call", "trainers"]


async def test_large_arrays_travel_beside_the_body_both_ways():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        array = np.arange(100_000, dtype=np.float64)
        doubled = await mesh.double.call_one(array)
        assert np.array_equal(doubled, array * 2)
        call, reply = net.sent
        assert [memoryview(b).nbytes for b in call.buffers] == [array.nbytes]
        assert np.shares_memory(np.frombuffer(call.buffers[0]), array), "not copied"
        assert [memoryview(b).nbytes for b in reply.buffers] == [array.nbytes]
        assert len(call.body) + len(reply.body) < 500


async def test_an_answer_is_freed_with_its_last_reference():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True, ranks=2)
        gc.disable()
        try:
            one = await mesh.slice(ranks=0).echo.call_one(np.zeros(10))
            many = await mesh.echo.call(np.zeros(10))
            references = [weakref.ref(array) for array in (one, *many)]
            del one, many
            assert [reference() for reference in references] == [None] * 3
        finally:
            gc.enable()


async def test_a_cancellation_of_what_is_over_or_never_came_changes_nothing():
    async with wired() as net:
        mesh = net.spawn(Worker, threads=True)
        await mesh.echo.call_one(1)
        host, sent = net.host(mesh), len(net.sent)
        cancel = net.sent[0].to(net.sent[0].receivers())
        for kind, rid in ((wire.CANCEL, cancel.rid), (wire.CANCEL, 999), (wire.CREDIT, 999)):
            cancel.kind, cancel.rid = kind, rid
            host.deliver(cancel)
        assert len(net.sent) == sent
        assert RequestKey(net.hub.address, 999) not in host._credits
        assert await mesh.echo.call_one(2) == 2


async def test_a_post_that_fails_does_not_hold_up_what_was_posted_behind_it(caplog):
    async with wired() as net:
        done = asyncio.Event()

        def post_both():
            net.hub.post(lambda: 1 / 0)
            net.hub.post(done.set)

        await asyncio.to_thread(post_both)
        async with asyncio.timeout(30):
            await done.wait()
        assert "an action on the loop failed" in caplog.text
