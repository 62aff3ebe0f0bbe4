"""Streams between processes of which one dies: the consumer gets what came and the death, the producer is stopped."""

import asyncio
import threading

import pytest
from support.wired import eventually, virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.errors import WorkerDied
from miles_agents.rpc.streams import STREAM_CREDITS


class Producer(Actor):
    """Yields without end, or a few and then waits; notes how its generators are left."""

    def __init__(self):
        self.made = 0
        self.left = []

    @endpoint
    async def few(self, count):
        try:
            for self.made in range(1, count + 1):
                yield self.made
            await asyncio.get_running_loop().create_future()
        finally:
            self.left.append("few")

    @endpoint
    async def endless(self):
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            self.left.append("endless")

    @endpoint
    def endless_on_thread(self):
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            self.left.append(threading.current_thread().name)

    @endpoint
    def ready(self):
        return True


class Consumer(Actor):
    """Takes one item of another's stream, keeps the stream, and stays."""

    def __init__(self):
        self.items = []

    @endpoint
    async def consume(self, producer, name):
        self.stream = producer.endpoint(name).call_one(*([3] if name == "few" else []))
        self.items.append(await anext(self.stream))
        await asyncio.get_running_loop().create_future()


async def collect(stream, view):
    """What the stream hands out before it ends with a death."""
    items = []
    with pytest.raises(WorkerDied):  # noqa: PT012 - the items before it are what is asked for
        async for item in stream:
            items.append(view(item))
    return items


@virtual
async def test_what_came_before_the_death_of_the_producer_is_handed_out_then_the_death():
    async with wired() as net:
        mesh = net.spawn(Producer, ranks=2)
        one = mesh.slice(ranks=0)
        stream, both = one.few.call_one(3), mesh.few.stream(2)
        await eventually(lambda: len(both._items) == 4 and len(stream._items) == 3)
        net.kill(mesh, 0)
        assert await collect(stream, lambda item: item) == [1, 2, 3]
        assert sorted(await collect(both, lambda pair: (pair[0].ranks, pair[1]))) == [(0, 1), (0, 2), (1, 1), (1, 2)]
        await eventually(lambda: net.actor(mesh, 1).left == ["few"])
        assert len(net.switch.in_flight) == 0


@virtual
@pytest.mark.parametrize("name", ["few", "endless"])
async def test_the_death_of_the_consumer_stops_the_producer(name):
    async with wired() as net:
        producer, consumer = net.spawn(Producer, name="producer"), net.spawn(Consumer, name="consumer")
        consuming = consumer.consume.call_one(producer, name)
        await eventually(lambda: net.actor(consumer).items)
        net.kill(consumer)
        with pytest.raises(WorkerDied):
            await consuming
        await eventually(lambda: net.actor(producer).left == [name])
        assert net.actor(producer).made <= STREAM_CREDITS + 1
        await eventually(lambda: len(net.host(producer).inbox) == 0)
        assert await producer.ready.call_one()


async def test_the_death_of_the_consumer_frees_a_thread_that_waits_for_credit():
    async with wired() as net:
        producer = net.spawn(Producer, name="producer", threads=True)
        consumer = net.spawn(Consumer, name="consumer")
        consuming = consumer.consume.call_one(producer, "endless_on_thread")
        await eventually(lambda: net.actor(producer).made == STREAM_CREDITS)
        await eventually(lambda: net.actor(consumer).items)
        net.kill(consumer)
        with pytest.raises(WorkerDied):
            await consuming
        await eventually(lambda: net.actor(producer).left == ["main of producer[0]"])
        assert await producer.ready.call_one()
