"""The switch: whoever cannot answer any more is answered for, and what the dead had asked for is stopped."""

import asyncio

import pytest
from support.wired import eventually, virtual, wired

from miles_agents.errors import InternalError
from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.errors import CallCancelled, NoSuchActor, WorkerDied
from miles_agents.wire import envelope as wire
from miles_agents.wire.frames import UnsendableMessage


class Worker(Actor):
    """Waits until it is let go, or asks another to."""

    def __init__(self):
        self.seen = []
        self.cancelled = []

    @endpoint
    async def wait(self, name):
        self.seen.append(name)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise

    @endpoint
    async def ask(self, other, name):
        self.seen.append(name)
        return await other.wait.call_one(name)

    @endpoint
    def echo(self, value):
        return value

    @endpoint
    async def numbers(self):
        for number in range(100):
            yield number


@virtual
async def test_the_death_of_a_receiver_ends_all_its_calls_at_once():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        one, group = mesh.slice(ranks=1).wait.call_one("one"), mesh.wait.call("group")
        await eventually(lambda: len(net.actor(mesh, 1).seen) == 2)
        before = net.loop.time()
        net.kill(mesh, 1)
        for future in (one, group):
            with pytest.raises(WorkerDied, match=r"actors\[1\] died"):
                await future
        assert net.loop.time() - before < 1.0
        await eventually(lambda: net.actor(mesh, 0).cancelled == ["group"])
        assert len(net.switch.in_flight) == 0


@virtual
async def test_what_a_dead_sender_had_asked_for_is_stopped():
    async with wired() as net:
        first, second = net.spawn(Worker, name="first"), net.spawn(Worker, name="second")
        future = first.ask.call_one(second, "orphan")
        await eventually(lambda: net.actor(second).seen == ["orphan"])
        net.kill(first)
        with pytest.raises(WorkerDied):
            await future
        await eventually(lambda: net.actor(second).cancelled == ["orphan"])
        # The answer finds nobody; it is dropped, and the other goes on.
        await eventually(lambda: len(net.host(second).inbox) == 0)
        assert await second.echo.call_one(1) == 1
        assert net.switch.dropped == 1


@virtual
async def test_of_several_that_die_together_each_is_answered_for_and_all_that_they_asked_is_stopped():
    async with wired() as net:
        asking, asked = net.spawn(Worker, ranks=3), net.spawn(Worker, name="asked")
        # Two of the dead have a request open at a living one; the third has none; a living one has one, too.
        living = net.spawn(Worker, name="living")
        futures = [asking.slice(ranks=rank).ask.call_one(asked, f"of {rank}") for rank in (0, 1)]
        futures.append(asking.slice(ranks=2).wait.call_one("idle"))
        other = living.ask.call_one(asked, "of the living")
        await eventually(lambda: sorted(net.actor(asked).seen) == ["of 0", "of 1", "of the living"])
        dead = {net.address(asking, rank) for rank in range(3)}
        for address in dead:
            del net._hops[address]
        net.switch.receivers_died(dead, WorkerDied("gone", evidence="killed", advice="Look.", may_have_run=True))
        for future in futures:
            with pytest.raises(WorkerDied):
                await future
        await eventually(lambda: sorted(net.actor(asked).cancelled) == ["of 0", "of 1"])
        assert len(net.switch.in_flight.pending_at(net.address(asked))) == 1
        other.cancel()
        with pytest.raises(CallCancelled):
            await other


@virtual
async def test_a_call_to_the_dead_is_answered_and_did_not_run():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=3)
        net.kill(mesh, 1)
        values = await mesh.options(return_exceptions=True).echo.call("v")
        assert [values[0], values[2]] == ["v", "v"]
        assert isinstance(values[1], NoSuchActor)
        assert values[1].fields["may_have_run"] is False
        with pytest.raises(NoSuchActor):
            await mesh.slice(ranks=1).echo.broadcast("v")


@virtual
async def test_a_stream_of_the_dead_ends_with_the_death():
    async with wired() as net:
        mesh = net.spawn(Worker)
        stream = mesh.numbers.call_one()
        assert await anext(stream) == 0
        net.kill(mesh)
        with pytest.raises(WorkerDied):
            async for _ in stream:
                pass
        assert net.switch.dropped == 0, "nobody credits a stream that is over"


@virtual
async def test_a_call_leaves_the_list_with_its_answer_of_any_kind():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        await mesh.echo.call(1)
        await mesh.echo.broadcast(1)
        assert len([item async for item in mesh.numbers.stream()]) == 200
        with pytest.raises(TypeError):
            await mesh.echo.call()
        await eventually(lambda: len(net.switch.in_flight) == 0)


class Refusing:
    """A way on that takes no calls."""

    def __init__(self, trouble, *, answers_for_itself=False):
        self.trouble = trouble
        self.answers_for_itself = answers_for_itself

    def send(self, envelope):
        if envelope.kind == wire.CALL:
            raise self.trouble


@virtual
@pytest.mark.parametrize("answers_for_itself", [False, True])
async def test_a_call_that_the_way_on_refuses_is_answered_and_forgotten(answers_for_itself):
    async with wired() as net:
        mesh, asker = net.spawn(Worker, ranks=3), net.spawn(Worker, name="asker")
        too_long = UnsendableMessage("too long", evidence="it", advice="shorten it")
        for rank, trouble in ((0, too_long), (1, OSError("odd"))):
            hop = Refusing(trouble, answers_for_itself=answers_for_itself)
            net._hops[net.address(mesh, rank)] = hop
        values = await mesh.options(return_exceptions=True).echo.call("v")
        assert [type(values[0]), values[2]] == [UnsendableMessage, "v"]
        assert isinstance(values[1], InternalError)
        assert "OSError: odd" in values[1].evidence
        with pytest.raises(UnsendableMessage, match="too long"):
            await asker.ask.call_one(mesh.slice(ranks=0), "from afar")
        assert len(net.switch.in_flight) == 0


@virtual
async def test_receivers_behind_one_hop_share_a_message():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=4)
        hops = {}

        class Node:
            """Two ranks behind one way on, which answers for them."""

            answers_for_itself = True

            def __init__(self, name):
                self.name = name

            def send(self, envelope):
                hops.setdefault(self.name, []).append(envelope)
                for target in envelope.receivers():
                    actors[target.rank].send(envelope.to([target]))

        actors = {rank: net._hops[net.address(mesh, rank)] for rank in range(4)}
        nodes = [Node("a"), Node("b")]
        for rank in range(4):
            net._hops[net.address(mesh, rank)] = nodes[rank // 2]
        future = mesh.echo.call("v")
        assert len(net.switch.in_flight) == 0, "the next switch keeps that list"
        assert list(await future) == ["v"] * 4
        assert {name: [len(e.receivers()) for e in sent] for name, sent in hops.items()} == {"a": [2], "b": [2]}
        assert hops["a"][0].body is hops["b"][0].body
        assert {e.kind for sent in hops.values() for e in sent} == {wire.CALL}
