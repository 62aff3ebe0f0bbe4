"""Streams and credits on loops and threads: order, ends, early leaving, and a producer that stays within its bounds."""

import asyncio
import threading

import pytest
from support.wired import eventually

from miles_agents.rpc.errors import WouldDeadlock
from miles_agents.rpc.streams import STREAM_CREDITS, CallStream, Credits, StreamStopped


class Source:
    """A stream, and what its consumer made known."""

    def __init__(self, thread=None):
        self.cancels = 0
        self.consumed = []
        self.stream = CallStream("m.items", self.cancel, self.consumed.append, thread or threading.get_ident())

    def cancel(self):
        self.cancels += 1


async def collect(stream):
    return [item async for item in stream]


async def turn():
    for _ in range(3):
        await asyncio.sleep(0)


async def test_items_come_in_order_then_the_end():
    source = Source()
    source.stream.put(0, "a")
    task = asyncio.ensure_future(collect(source.stream))
    await turn()
    source.stream.put(1, "b")
    await turn()
    source.stream.put(0, "c")
    source.stream.finish()
    source.stream.put(0, "too late")
    assert await task == ["a", "b", "c"]
    assert source.consumed == [0, 1, 0]
    assert await collect(source.stream) == []
    assert repr(source.stream) == "<CallStream m.items ended>"


async def test_an_error_comes_after_the_items_before_it_and_once():
    source = Source()
    source.stream.put(0, "a")
    source.stream.finish(ValueError("broken"))
    source.stream.finish(ValueError("again"))
    assert await anext(source.stream) == "a"
    with pytest.raises(ValueError, match="broken"):
        await anext(source.stream)
    assert await collect(source.stream) == []


async def test_none_is_an_item_like_any_other():
    source = Source()
    source.stream.put(0, None)
    source.stream.finish()
    assert await collect(source.stream) == [None]


async def test_a_thread_iterates_while_the_loop_brings_items():
    source = Source()
    outcome = []
    thread = threading.Thread(target=lambda: outcome.extend(source.stream))
    thread.start()
    for number in range(100):
        source.stream.put(0, number)
        if number % 10 == 0:
            await asyncio.sleep(0)
    source.stream.finish()
    thread.join(30)
    assert outcome == list(range(100))


async def test_iterating_on_the_thread_that_brings_the_items_is_refused():
    with pytest.raises(WouldDeadlock, match=r"iterating over m\.items would wait for ever"):
        next(Source().stream)


async def test_another_loop_can_iterate():
    source = Source()
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(asyncio.run(collect(source.stream))))
    thread.start()
    for number in range(100):
        source.stream.put(0, number)
    source.stream.finish()
    thread.join(30)
    assert outcome == [list(range(100))]


async def test_two_tasks_share_a_stream_and_both_end():
    source = Source()
    tasks = [asyncio.ensure_future(collect(source.stream)) for _ in range(2)]
    await turn()
    for number in range(10):
        source.stream.put(0, number)
        await turn()
    source.stream.finish()
    async with asyncio.timeout(30):
        parts = await asyncio.gather(*tasks)
    assert sorted(parts[0] + parts[1]) == list(range(10))


async def test_leaving_early_stops_the_producers_once_and_drops_what_is_left():
    source = Source()
    async with source.stream as stream:
        stream.put(0, 1)
        stream.put(0, 2)
        assert await anext(stream) == 1
    source.stream.close()
    await source.stream.aclose()
    assert source.cancels == 1
    assert await collect(source.stream) == []


async def test_leaving_after_the_end_tells_nobody():
    source = Source()
    source.stream.finish()
    source.stream.close()
    assert source.cancels == 0


async def test_closing_lets_go_those_who_wait():
    source = Source()
    task = asyncio.ensure_future(collect(source.stream))
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(list(source.stream)))
    thread.start()
    await turn()
    source.stream.close()
    assert await task == []
    thread.join(30)
    assert outcome == [[]]


def test_a_producing_thread_waits_for_credit():
    credit = Credits()
    taken = threading.Semaphore(0)
    stopped = threading.Event()

    def produce():
        try:
            while True:
                credit.take()
                taken.release()
        except StreamStopped:
            stopped.set()

    thread = threading.Thread(target=produce)
    thread.start()
    for _ in range(STREAM_CREDITS):
        assert taken.acquire(timeout=30)
    assert not taken.acquire(timeout=0.02)
    credit.grant(2)
    assert taken.acquire(timeout=30)
    assert taken.acquire(timeout=30)
    credit.stop()
    thread.join(30)
    assert stopped.is_set()
    assert not taken.acquire(blocking=False)


async def test_a_producing_task_waits_for_credit_from_any_thread():
    credit = Credits(1)
    taken = []

    async def produce():
        while True:
            await credit.take_async()
            taken.append(1)

    task = asyncio.ensure_future(produce())
    await turn()
    assert len(taken) == 1
    thread = threading.Thread(target=lambda: credit.grant(1))
    thread.start()
    await eventually(lambda: len(taken) == 2)
    thread.join(30)
    credit.stop()
    with pytest.raises(StreamStopped):
        await task


async def test_stopping_comes_before_credit_that_is_left():
    credit = Credits(5)
    credit.stop()
    with pytest.raises(StreamStopped):
        credit.take()
    with pytest.raises(StreamStopped):
        await credit.take_async()
