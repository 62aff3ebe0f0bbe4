"""What threads of a worker send: the short way of a last answer overtakes nothing that its thread sent before."""

import asyncio
import random
import threading

import pytest
from support.wired import eventually

from miles_agents.rpc.node import RpcNode
from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import Address, Envelope

NUM_ROUNDS = 200


class Way:
    """What was routed: thread and number of each message, in order, and on which thread."""

    def __init__(self):
        self.routed = []
        self.threads = set()

    def route(self, envelope):
        self.threads.add(threading.get_ident())
        self.routed.append((envelope.mesh, envelope.rid))

    def numbers(self, thread):
        return [number for mesh, number in self.routed if mesh == thread]


def an_answer(thread, number, kind):
    return Envelope(kind, number, Address(2, 0, 1), thread, (0, 1, 0))


def answer_all(node, thread):
    """Streams of items, which go by the loop, each ended by a reply that may go at once."""
    rng = random.Random(thread)
    number = 0
    for _ in range(NUM_ROUNDS):
        for _ in range(rng.randrange(3)):
            number += 1
            node.send(an_answer(thread, number, wire.ITEM))
        number += 1
        node.send(an_answer(thread, number, wire.REPLY), at_once=True)
    return number


@pytest.mark.parametrize("routes_from_any_thread", [True, False])
async def test_a_reply_at_once_comes_after_the_items_that_its_thread_posted_before(routes_from_any_thread):
    way = Way()
    node = RpcNode(Address(2, 0, 1), "worker", way.route, routes_from_any_thread=routes_from_any_thread)
    counts = await asyncio.gather(*(asyncio.to_thread(answer_all, node, thread) for thread in range(3)))
    for thread, count in enumerate(counts):
        await eventually(lambda thread=thread, count=count: len(way.numbers(thread)) == count)
        assert way.numbers(thread) == list(range(1, count + 1))
    if not routes_from_any_thread:
        assert way.threads == {threading.get_ident()}


async def test_a_reply_at_once_leaves_from_its_own_thread_where_the_way_allows_it():
    way = Way()
    node = RpcNode(Address(2, 0, 1), "worker", way.route, routes_from_any_thread=True)
    done = threading.Thread(target=node.send, args=[an_answer(0, 1, wire.REPLY)], kwargs={"at_once": True})
    done.start()
    done.join()  # the loop has had no turn
    assert way.routed == [(0, 1)]
    assert threading.get_ident() not in way.threads
