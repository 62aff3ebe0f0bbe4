"""Calls between nodes, on a virtual clock: every verb, deadlines, failures, windows, cancellation by the caller."""

import asyncio
import gc

import pytest
from support.wired import eventually, virtual, wired

from miles_agents.errors import MilesError, PeerFault
from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.calls import Window
from miles_agents.rpc.context import current_actor, current_call
from miles_agents.rpc.errors import CallCancelled, DeadlineExceeded, NoSuchActor, StaleHandle, WindowFull, WrongVerb
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.shape import Shape
from miles_agents.wire import envelope as wire
from miles_agents.wire.codec import CannotTravel
from miles_agents.wire.envelope import Address, Envelope
from miles_agents.wire.remote_error import RemoteError


def narrow(node, mesh, max_calls):
    """One narrow window for all endpoints of the mesh."""
    window = Window(max_calls=max_calls)
    node._windows.update({(mesh._info.mesh, lane): window for lane in ("main", "async", "io")})
    return window


class OddError(ValueError):
    """An error of user code."""


class Worker(Actor):
    """Does what tests ask for; all of it on the loop."""

    def __init__(self):
        self.seen = []
        self.cancelled = []
        self.gate = asyncio.Event()

    @endpoint
    def echo(self, value=None):
        self.seen.append(value)
        return value

    @endpoint
    def place(self):
        call = current_call()
        return [call.position, call.size, current_actor().rank, current_actor().size, call.method]

    @endpoint
    def fail_at(self, *positions):
        if current_call().position in positions:
            raise OddError(f"position {current_call().position}", 42)
        return "fine"

    @endpoint
    async def wait(self, name=None):
        self.seen.append(name)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        return name

    @endpoint
    async def wait_unless(self, position):
        if current_call().position == position:
            raise OddError("not me")
        await self.wait("other")

    @endpoint
    async def remaining(self):
        return current_call().remaining_s()

    @endpoint
    async def ask_after(self, pause_s, other, method, *args):
        await asyncio.sleep(pause_s)
        return await other.endpoint(method).call_one(*args)

    @endpoint
    async def ask_within(self, timeout_s, other):
        return await other.options(timeout_s=timeout_s).remaining.call_one()

    @endpoint
    async def numbers(self, count):
        for number in range(count):
            self.seen.append(number)
            yield number

    @endpoint(thread="io")
    def now(self, value):
        self.seen.append(value)
        return value


@virtual
async def test_call_gives_a_value_of_each_rank_by_coordinate():
    async with wired() as net:
        mesh = net.spawn(Worker, hosts=2, gpus=2)
        places = await mesh.place.call()
        assert places.at(hosts=1, gpus=0) == [2, 4, 2, 4, "place"]
        part = await mesh.slice(gpus=1).place.call()
        assert [value[:4] for value in part] == [[0, 2, 1, 4], [1, 2, 3, 4]]
        assert part.shape.extent.dims == ("hosts",)


@virtual
async def test_call_one_broadcast_and_choose_reach_whom_they_should():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=3)
        assert await mesh.slice(ranks=2).echo.call_one("one") == "one"
        assert await mesh.slice(ranks=2).place.call_one() == [0, 1, 2, 3, "place"]
        assert await mesh.echo.broadcast("all") is None
        assert [net.actor(mesh, rank).seen for rank in range(3)] == [["all"], ["all"], ["one", "all"]]
        assert sorted(await asyncio.gather(*[mesh.place.choose() for _ in range(3)])) == [
            [0, 1, rank, 3, "place"] for rank in range(3)
        ]


@virtual
async def test_a_broadcast_is_done_when_it_is_taken_from_the_queue_and_not_before():
    async with wired() as net:
        mesh = net.spawn(Worker)
        net.delay_s = 1.0
        taken = mesh.wait.broadcast("b")
        await asyncio.sleep(1.5)
        assert not taken.done()
        await taken
        assert net.actor(mesh).seen == ["b"]
        assert len(net.host(mesh).inbox) == 1, "it still runs"


@virtual
async def test_stream_gives_answers_as_they_come():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=3)
        net.actor(mesh, 1).gate.set()
        stream = mesh.wait.stream("s")
        point, value = await anext(stream)
        assert (point.rank, value) == (1, "s")
        net.actor(mesh, 2).gate.set()
        net.actor(mesh, 0).gate.set()
        assert sorted([point.rank async for point, _ in stream]) == [0, 2]


@virtual
async def test_generators_stream_with_points_and_without():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        assert [item async for item in mesh.slice(ranks=0).numbers.call_one(40)] == list(range(40))
        pairs = [(point.rank, item) async for point, item in mesh.numbers.stream(20)]
        assert sorted(pairs) == [(rank, item) for rank in range(2) for item in range(20)]
        assert len(net.host(mesh).inbox) == 0
        assert net.host(mesh)._credits == {}


@virtual
async def test_an_async_producer_stays_within_its_credit_and_stops_with_its_consumer():
    async with wired() as net:
        mesh = net.spawn(Worker)
        stream = mesh.numbers.call_one(1000)
        await asyncio.sleep(1)
        seen = net.actor(mesh).seen
        assert len(seen) == 16
        for taken in range(1, 40):
            await anext(stream)
            await asyncio.sleep(1)
            assert len(seen) <= taken + 16
        stream.close()
        await eventually(lambda: len(net.host(mesh).inbox) == 0)
        assert len(seen) <= 39 + 16


@virtual
async def test_a_stream_that_is_dropped_stops_its_producer():
    async with wired() as net:
        mesh = net.spawn(Worker)
        async for item in mesh.numbers.call_one(1000):
            if item == 3:
                break
        gc.collect()
        await eventually(lambda: len(net.host(mesh).inbox) == 0)
        assert len(net.hub.calls) == 0


@virtual
async def test_a_handle_that_knows_no_endpoints_can_stream_and_never_waits_for_ever():
    async with wired() as net:
        known = net.spawn(Worker)
        blind = ActorMesh(MeshInfo(known._info.mesh, "blind", known._info.incarnations), known.shape, net.hub)
        assert len([item async for item in blind.numbers.stream(100)]) == 100
        assert [value async for _, value in blind.echo.stream(1)] == [1]
        assert net.host(known)._credits == {}
        with pytest.raises(WrongVerb, match="was called for one answer"):
            await blind.numbers.call_one(3)


@virtual
async def test_a_deadline_ends_the_call_and_stops_the_callee():
    async with wired() as net:
        mesh = net.spawn(Worker)
        before = net.loop.time()
        with pytest.raises(DeadlineExceeded, match="did not answer within its deadline") as caught:
            await mesh.options(timeout_s=2.5).wait.call_one("x")
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.fields["may_have_run"] is True
        assert net.loop.time() - before == pytest.approx(2.5)
        await eventually(lambda: net.actor(mesh).cancelled == ["x"])
        assert len(net.hub.calls) == len(net.host(mesh).inbox) == len(net.switch.in_flight) == 0


@virtual
async def test_the_remaining_time_shrinks_on_the_way():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        assert await mesh.slice(ranks=0).remaining.call_one() is None
        narrow(net.hub, mesh, 1)
        mesh.slice(ranks=1).wait.call_one("in the way")
        left = mesh.slice(ranks=0).options(timeout_s=60.0).remaining.call_one()
        await asyncio.sleep(7.0)
        net.actor(mesh, 1).gate.set()
        assert await left == pytest.approx(53.0, abs=0.01)


@virtual
async def test_a_nested_call_inherits_what_is_left():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        first, second = mesh.slice(ranks=0), mesh.slice(ranks=1)
        left = await first.options(timeout_s=10.0).ask_after.call_one(4.0, second, "remaining")
        assert left == pytest.approx(6.0, abs=0.01)
        for own_s, expected in ((3.0, 3.0), (30.0, 10.0)):
            left = await first.options(timeout_s=10.0).ask_within.call_one(own_s, second)
            assert left == pytest.approx(expected, abs=0.01)
        with pytest.raises(DeadlineExceeded):
            await first.options(timeout_s=10.0).ask_after.call_one(4.0, second, "wait")
        await eventually(lambda: net.actor(mesh, 1).cancelled == [None])


@virtual
async def test_a_call_whose_time_is_over_is_not_sent():
    async with wired() as net:
        mesh = net.spawn(Worker)
        with pytest.raises(DeadlineExceeded) as caught:
            await mesh.options(timeout_s=0.0).echo.call_one(1)
        assert caught.value.fields["may_have_run"] is False
        assert net.sent == []


@virtual
async def test_a_user_error_is_both_remote_and_of_its_type():
    async with wired() as net:
        mesh = net.spawn(Worker, name="trainers", ranks=3)
        with pytest.raises(OddError) as caught:
            await mesh.fail_at.call(1)
        error = caught.value
        assert isinstance(error, RemoteError)
        assert error.args == ("position 1", 42)
        assert "in fail_at" in error.remote_traceback
        assert (error.origin.actor, error.origin.method) == ("trainers[1]", "fail_at")
        assert error.origin.incarnation == net.address(mesh, 1).incarnation
        assert any("Point(ranks=1)" in note for note in error.__notes__)


@virtual
async def test_a_group_call_fails_at_the_first_failure_and_stops_the_rest():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=3)
        with pytest.raises(OddError):
            await mesh.wait_unless.call(2)
        await eventually(lambda: [net.actor(mesh, rank).cancelled for rank in range(3)] == [["other"], ["other"], []])
        assert len(net.hub.calls) == 0


@virtual
async def test_errors_can_be_collected_in_their_places():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=4).options(return_exceptions=True)
        values = await mesh.fail_at.call(1, 3)
        assert [type(value) is str for value in values] == [True, False, True, False]
        assert isinstance(values[3], OddError)
        net.kill(mesh, 0)
        after = await mesh.fail_at.call(1)
        assert isinstance(after[0], NoSuchActor)
        assert isinstance(after[1], OddError)
        assert after[2] == after[3] == "fine"


@virtual
async def test_an_error_ends_a_stream_after_the_items_before_it():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        net.actor(mesh, 0).gate.set()
        stream = mesh.wait.stream("x")
        await asyncio.sleep(1)
        net.kill(mesh, 1)
        assert (await anext(stream))[1] == "x"
        with pytest.raises(PeerFault, match="died"):
            await anext(stream)


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        ((1, object()), {}, "argument 1 "),
        (([0, {"a": object()}],), {}, "argument 0[1]['a'] "),
        ((), {"samples": [0, 1, 2, {"metadata": {"env": open}}]}, "argument samples[3]['metadata']['env'] "),
    ],
)
@virtual
async def test_an_argument_that_cannot_travel_is_refused_at_the_caller(args, kwargs, path):
    async with wired() as net:
        mesh = net.spawn(Worker)
        with pytest.raises(CannotTravel) as caught:
            mesh.echo.call_one(*args, **kwargs)
        assert f"cannot travel: {path}" in str(caught.value)
        assert net.sent == []
        assert len(net.hub.calls) == 0


@virtual
async def test_a_handle_works_where_it_was_sent():
    async with wired() as net:
        first, second = net.spawn(Worker, name="first"), net.spawn(Worker, name="second")
        assert await first.ask_after.call_one(0.0, second, "echo", "via") == "via"
        assert net.actor(second).seen == ["via"]


@virtual
async def test_an_earlier_life_is_refused_and_did_not_run():
    async with wired() as net:
        mesh = net.spawn(Worker)
        mesh._info.incarnations[0] -= 1
        with pytest.raises(StaleHandle) as caught:
            await mesh.echo.call_one(1)
        assert caught.value.fields["may_have_run"] is False


@virtual
async def test_a_task_that_is_cancelled_cancels_its_call_all_the_way_down():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        task = asyncio.ensure_future(
            wait_for(mesh.slice(ranks=0).ask_after.call_one(0.0, mesh.slice(ranks=1), "wait", "deep"))
        )
        await eventually(lambda: net.actor(mesh, 1).seen == ["deep"])
        task.cancel()
        await eventually(lambda: net.actor(mesh, 1).cancelled == ["deep"])
        assert task.cancelled()
        assert len(net.switch.in_flight) == 0


async def wait_for(future):
    return await future


@pytest.mark.parametrize("verb", ["call", "call_one", "broadcast"])
@virtual
async def test_whoever_awaits_an_abandoned_call_later_is_told(verb):
    async with wired() as net:
        mesh = net.spawn(Worker)
        net.delay_s = 1.0
        future = getattr(mesh.wait, verb)("x")
        task = asyncio.ensure_future(wait_for(future))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.sleep(0)
        with pytest.raises(CallCancelled) as caught:
            await future
        assert caught.value.fields["may_have_run"] is True


@virtual
async def test_calls_beyond_the_window_wait_and_go_in_order():
    async with wired() as net:
        mesh = net.spawn(Worker)
        narrow(net.hub, mesh, 2)
        futures = [mesh.wait.call_one(number) for number in range(5)]
        await asyncio.sleep(1)
        assert net.actor(mesh).seen == [0, 1]
        futures[3].cancel()
        with pytest.raises(CallCancelled) as caught:
            await futures[3]
        assert caught.value.fields["may_have_run"] is False
        futures[0].cancel()
        await asyncio.sleep(1)
        assert net.actor(mesh).seen == [0, 1, 2]
        net.actor(mesh).gate.set()
        assert await futures[4] == 4
        assert net.actor(mesh).seen == [0, 1, 2, 4]
        with pytest.raises(CallCancelled):
            await futures[0]


@virtual
async def test_a_deadline_that_passes_in_the_window_did_not_run():
    async with wired() as net:
        mesh = net.spawn(Worker)
        narrow(net.hub, mesh, 1)
        mesh.wait.call_one("first")
        with pytest.raises(DeadlineExceeded, match="deadline") as caught:
            await mesh.options(timeout_s=1.0).wait.call_one("second")
        assert caught.value.fields["may_have_run"] is False
        assert "never sent" in caught.value.evidence
        assert net.actor(mesh).seen == ["first"]


@virtual
async def test_too_much_waiting_is_refused():
    async with wired() as net:
        mesh = net.spawn(Worker)
        window = narrow(net.hub, mesh, 1)
        first = mesh.wait.call_one("first")
        window._waiting_bytes = 1 << 40
        with pytest.raises(WindowFull, match="cannot be queued"):
            await mesh.wait.call_one("second")
        window._waiting_bytes = 0
        net.actor(mesh).gate.set()
        assert await first == "first"


@virtual
async def test_many_waiting_calls_that_are_answered_at_once_go_in_order():
    async with wired() as net:
        node = net.hub
        mesh = net.spawn(Worker)
        # To an actor in this very process: every answer comes before the send returns.
        node_of_actor = net.nodes[net.address(mesh)]
        node_of_actor._route = net.switch.route
        net._hops[net.address(mesh)].send = node_of_actor.deliver
        narrow(node, mesh, 1)
        gate = mesh.wait.call_one("gate")
        futures = [mesh.now.call_one(number) for number in range(3000)]
        net.actor(mesh).gate.set()
        assert await gate == "gate"
        assert await asyncio.gather(*map(wait_for, futures)) == list(range(3000))
        assert net.actor(mesh).seen == ["gate", *range(3000)]


@virtual
async def test_closing_a_node_ends_every_call_and_sends_nothing_more():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        narrow(net.hub, mesh, 1)
        sent, held = mesh.wait.call("sent"), mesh.wait.call("held")
        await asyncio.sleep(1)
        net.hub.close(MilesError("the run is over", advice="Nothing."))
        for future in (sent, held, mesh.wait.call("later")):
            with pytest.raises(MilesError, match="the run is over") as caught:
                await future
            assert len(caught.value.__notes__) == 1, "each call has an error of its own"
        await asyncio.sleep(1)
        assert net.actor(mesh, 0).seen == ["sent"]
        assert len(net.hub.calls) == 0


@virtual
async def test_a_process_without_an_actor_answers_that_it_has_none():
    async with wired() as net:
        mesh = ActorMesh(MeshInfo(0, "hub", {0: 1}), Shape.of(ranks=1), net.spawn(Worker).node())
        with pytest.raises(NoSuchActor, match="hosts no actor"):
            await mesh.anything.call_one()


@virtual
async def test_late_and_foreign_answers_are_counted_and_dropped():
    async with wired() as net:
        mesh = net.spawn(Worker)
        future = mesh.wait.call_one("x")
        rid = next(iter(net.hub.calls)).rid
        asker = Envelope(wire.CALL, rid, net.hub.address, 2, (0, 1, 0))
        stranger = Address(9, 9, 9)
        for kind in (wire.REPLY, wire.ERROR, wire.ITEM, wire.END, wire.STARTED):
            net.hub.deliver(asker.answer(kind, stranger, b"\xc0"))
        assert net.hub.calls.stats.late == 5
        assert not future.done()
        net.actor(mesh).gate.set()
        assert await future == "x"


@pytest.mark.parametrize(
    ("kind", "body"),
    [(wire.REPLY, b"\xc1"), (wire.ITEM, b"\xc1"), (wire.ERROR, b"\xc1"), (wire.ERROR, b"\xc0")],
)
@virtual
async def test_an_answer_that_cannot_be_read_ends_the_call(kind, body):
    async with wired() as net:
        mesh = net.spawn(Worker)
        future = mesh.wait.call_one("x")
        rid = next(iter(net.hub.calls)).rid
        asker = Envelope(wire.CALL, rid, net.hub.address, 2, (0, 1, 0))
        net.hub.deliver(asker.answer(kind, net.address(mesh), body))
        with pytest.raises(MilesError, match="cannot be re"):
            await future
