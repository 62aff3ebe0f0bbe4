"""What is sent leaves at once or at the end of its turn or tick, in order, whatever happens in between."""

import asyncio
import contextlib
import threading

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.links import an_envelope, virtual

from miles_agents.virtual_time import run_virtual
from miles_agents.wire.link import Link
from miles_agents.wire.peer import Peer
from miles_agents.wire.session import VERSION, Session, parse_frame, parse_items
from miles_agents.wire.short_frame import RID, SHORT, Arrived, read_numbers
from miles_agents.wire.transport import TransportStats
from miles_agents.wire.turns import Turn, current_turn


class Recording:
    """A transport that takes everything and remembers the numbers of the requests, message by message."""

    address = "nowhere"
    stats = TransportStats()

    def __init__(self):
        self.messages = []

    def send(self, connection, frames):
        if frames[0][:1] == SHORT:
            self.messages.append([read_numbers(frames[0], VERSION)[RID]])
        else:
            items = parse_items(parse_frame(frames[0]).payload, list(frames[1:]), 0.0)
            self.messages.append([item.numbers[RID] if isinstance(item, Arrived) else item.rid for item in items])
        return True

    def close(self):
        """Nothing is open."""

    @property
    def sent(self):
        return [number for message in self.messages for number in message]


class Sender:
    """A peer on a recording transport, and what it accepted."""

    def __init__(self):
        link = Link()
        self.transport = Recording()
        link.transport = self.transport
        self.peer = Peer("peer", Session(1), "", link)
        self.peer.connection = b"c"
        self.accepted = []

    def send(self, buffers=()):
        number = len(self.accepted) + 1
        self.accepted.append(number)
        self.peer.send(an_envelope(number, 3, buffers))


def in_turn(steps, *, more_unknown=False):
    """What a transport does with the messages of one read: all but the last know that more come."""
    turn = current_turn()
    is_ours = turn.begin()
    turn.more = more_unknown
    try:
        for index, step in enumerate(steps):
            turn.more = more_unknown or index < len(steps) - 1
            with contextlib.suppress(LookupError):
                step()
    finally:
        if is_ours:
            turn.end()


sends = st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=4)
one_step = st.one_of(
    st.tuples(st.just("send"), sends),
    st.tuples(st.just("turn"), st.lists(st.tuples(sends, st.booleans()), min_size=1, max_size=4)),
    st.tuples(st.just("drain"), st.lists(st.tuples(sends, st.booleans()), min_size=1, max_size=4)),
    st.tuples(st.just("thread"), sends),
    st.tuples(st.just("flush"), st.integers(0, 1)),
    st.tuples(st.just("tick"), st.none()),
)


async def do(step, senders):
    kind, what = step

    def send_all(pairs, raises=False):
        for index, with_buffer in pairs:
            senders[index].send([b"buffer"] if with_buffer else [])
        if raises:
            raise LookupError

    if kind == "send":
        send_all(what)
    elif kind in ("turn", "drain"):
        in_turn([lambda one=one: send_all(*one) for one in what], more_unknown=kind == "drain")
    elif kind == "thread":
        thread = threading.Thread(target=send_all, args=[what])
        thread.start()
        thread.join()
    elif kind == "flush":
        senders[what].peer.flush()
    else:
        await asyncio.sleep(0)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(one_step, max_size=12))
def test_whatever_was_accepted_is_sent_in_order_once_the_loop_is_idle(steps):
    async def main():
        senders = [Sender(), Sender()]
        for step in steps:
            await do(step, senders)
            for sender in senders:
                assert sender.transport.sent == sender.accepted[: len(sender.transport.sent)]
        await asyncio.sleep(1)
        for sender in senders:
            assert sender.transport.sent == sender.accepted
            assert not sender.peer.session.waiting

    run_virtual(main())


@virtual
async def test_messages_on_their_own_leave_at_once_and_those_of_a_burst_together():
    sender = Sender()
    for _ in range(5):
        sender.send()
    # The second shows that there is a burst; what comes behind it waits for the end of the tick.
    assert sender.transport.messages == [[1], [2]]
    await asyncio.sleep(0.01)
    assert sender.transport.messages == [[1], [2], [3, 4, 5]]
    for number in (6, 7):
        sender.send()
        assert sender.transport.messages[-1] == [number]
        await asyncio.sleep(0.01)
    assert sender.transport.sent == sender.accepted


@virtual
async def test_answers_to_messages_that_came_together_leave_together():
    sender = Sender()
    in_turn([sender.send] * 3)
    assert sender.transport.sent == [1, 2, 3]
    assert len(sender.transport.messages) == 1


@virtual
async def test_the_answer_to_a_single_message_leaves_before_the_turn_ends():
    sender, seen = Sender(), []
    in_turn([lambda: (sender.send(), seen.append(list(sender.transport.sent)))])
    assert seen == [[1]]


@virtual
async def test_what_is_sent_from_another_thread_does_not_overtake_what_waits_for_the_end_of_a_turn():
    sender = Sender()

    def in_between():
        sender.send()
        thread = threading.Thread(target=sender.send)
        thread.start()
        thread.join()

    in_turn([in_between, lambda: None])
    assert sender.transport.sent == [1, 2]


@virtual
async def test_a_peer_without_a_connection_keeps_what_it_is_given():
    sender = Sender()
    sender.peer.connection = None
    in_turn([sender.send, sender.send])
    sender.send()
    await asyncio.sleep(0.01)
    assert sender.transport.messages == []
    sender.peer.connection = b"c"
    sender.peer.flush()
    assert sender.transport.messages == [[1, 2, 3]]


def test_a_turn_flushes_each_once_in_order_at_its_end():
    turn, flushed = Turn(), []
    assert turn.begin()
    for name in ("a", "b"):
        turn.at_end(lambda name=name: flushed.append((name, turn.reading, turn.more)))
    turn.more = True
    assert flushed == []
    turn.end()
    assert flushed == [("a", False, False), ("b", False, False)]
    turn.begin()
    turn.end()
    assert len(flushed) == 2


def test_a_flush_that_fails_costs_the_others_nothing():
    turn, flushed = Turn(), []

    def fail():
        raise LookupError("a transport's own trouble")

    turn.begin()
    turn.at_end(fail)
    turn.at_end(lambda: flushed.append("b"))
    turn.end()
    assert flushed == ["b"]


async def test_what_is_sent_together_leaves_in_one_message_at_the_end():
    sender = Sender()
    with current_turn().together():
        sender.send()
        sender.send()
        assert sender.transport.messages == []
    assert sender.transport.messages == [[1, 2]]
    assert not current_turn().reading


def test_a_turn_inside_a_turn_belongs_to_the_outer_one():
    turn = Turn()
    assert turn.begin()
    assert not turn.begin()
    assert turn.reading


def test_every_thread_has_a_turn_of_its_own():
    mine, theirs = current_turn(), []
    thread = threading.Thread(target=lambda: theirs.append(current_turn()))
    thread.start()
    thread.join()
    assert theirs[0] is not mine
    assert current_turn() is mine
