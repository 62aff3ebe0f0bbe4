"""Links and whoever is not who they say, garbage, and bugs of our own: each costs one message and no more."""

import asyncio
import logging

import msgpack
import pytest
from support.links import Above, Acceptor, Dialer, an_envelope, met, settled, virtual
from support.transports import Recorder

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import CALL, Address, Envelope
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.link import LinkDialer
from miles_agents.wire.link_handlers import LinkStats
from miles_agents.wire.memory_transport import MemoryNetwork

# -- whoever is not who they say ---------------------------------------------------------------------------------


@virtual
async def test_a_second_key_that_claims_a_session_is_refused_and_the_first_goes_on():
    network, hub, dialer = await met()
    thief = Dialer(network, "thief", session=1)
    await asyncio.sleep(1)
    assert thief.above.events == [("refused", "this session belongs to another key", True)]
    dialer.send(1)
    hub.peer("a").send(an_envelope(2))
    await settled()
    assert hub.above.numbers("a") == [1]
    assert dialer.above.numbers() == [2]
    assert thief.above.numbers() == []


@virtual
async def test_two_peers_do_not_disturb_each_other():
    network, hub, first = await met()
    second = Dialer(network, "b", session=2)
    await asyncio.sleep(1)
    first.send(1, 2)
    second.send(11)
    hub.peer("b").send(an_envelope(21))
    await settled()
    second.cut()
    first.send(3)
    second.send(12)
    hub.peer("b").send(an_envelope(22))
    await asyncio.sleep(1)
    assert hub.above.numbers("a") == [1, 2, 3]
    assert hub.above.numbers("b") == [11, 12]
    assert (first.above.numbers(), second.above.numbers()) == ([], [21, 22])
    assert first.above.count("up") == 1


@virtual
async def test_a_connection_that_greets_for_a_second_session_leaves_the_first():
    _, hub, dialer = await met()
    dialer.raw(wire.pack_frame(wire.HELLO, 5, 0, 0, {"name": "other", "received": 0}))
    await settled()
    assert hub.above.events[-2:] == [("down", "a"), ("up", "other", False)]
    assert not hub.peer("a").is_up
    dialer.send(1)
    await settled()
    assert hub.above.numbers() == []
    assert "frame of another session" in hub.link.stats.dropped


GARBAGE = [
    [b""],
    [b"\xc1"],
    [b"GET / HTTP/1.1"],
    [b"\x96\x01" + b"\x91" * 600 + b"\xc0"],
    [msgpack.packb([2, wire.DATA, 1, 1, 0, []])],
    [msgpack.packb([1, wire.DATA, 1, 1, 0, None])],
    [msgpack.packb([1, wire.DATA, 1, 1, 0, [[1]]])],
    [msgpack.packb([1, wire.DATA, 1, 1, 0, []]), b"nobody's buffer"],
    [msgpack.packb([1, wire.DATA, 1, 0, 0, []])],
    [msgpack.packb([1, wire.ACK, 1, 0, 12345, None])],
    [msgpack.packb([1, wire.ACK, 1, -1, 0, None])],
    [msgpack.packb([1, wire.RESEND, 1, 0, 0, None])],
    [msgpack.packb([1, wire.BEAT, 1, 0, 0, None])],
    [msgpack.packb([1, wire.BEAT, 1, 0, 0, ["1", {}]])],
    [msgpack.packb([1, wire.ANSWER, 1, 0, 0, [1, []]])],
    [msgpack.packb([1, wire.GOODBYE, 1, 0, 0, None])],
    [b"\x96\x01\x0a\x01\x00\x00" + b"\x91" * 500 + b"\xc0"],
    [msgpack.packb([1, wire.WELCOME, 1, 0, 0, {}])],
    [msgpack.packb([1, wire.REFUSE, 1, 0, 0, []])],
    [msgpack.packb([1, wire.RESET, 1, 0, 0, None])],
    [msgpack.packb([1, wire.ACK, 2, 0, 0, None])],
    [msgpack.packb([1, wire.HELLO, 1, 0, 0, {"received": 99}])],
]


@virtual
@pytest.mark.parametrize("frames", GARBAGE, ids=lambda frames: repr(frames[0][:20]))
async def test_garbage_of_a_peer_is_counted_and_disturbs_nobody(frames):
    network, hub, dialer = await met()
    other = Dialer(network, "b", session=2)
    await asyncio.sleep(1)
    events = len(hub.above.events)
    hub.peer("a").send(an_envelope(8))
    dialer.raw(*frames)
    await settled()
    assert sum(hub.link.stats.dropped.values()) == 1
    assert len(hub.above.events) == events
    dialer.send(1)
    other.send(2)
    hub.peer("a").send(an_envelope(9))
    await settled()
    assert hub.above.heard == [("a", 1), ("b", 2)]
    assert dialer.above.numbers() == [8, 9]


@virtual
@pytest.mark.parametrize(
    "frame",
    [
        b"\xc1",
        msgpack.packb([1, wire.WELCOME, 1, 0, 0, None]),
        msgpack.packb([1, wire.REFUSE, 1, 0, 0, None]),
        msgpack.packb([1, wire.REFUSE, 1, 0, 0, [1, True]]),
        msgpack.packb([1, wire.REFUSE, 2, 0, 0, ["for another session", True]]),
        msgpack.packb([1, wire.ACK, 1, 0, 5, None]),
        msgpack.packb([1, wire.HELLO, 1, 0, 0, {"received": 0}]),
        msgpack.packb([1, wire.ANSWER, 1, 0, 0, [None, {}]]),
    ],
    ids=repr,
)
async def test_garbage_of_an_acceptor_is_counted_by_the_dialer(frame):
    _, hub, dialer = await met()
    events = list(dialer.above.events)
    assert hub.link.transport.send(hub.peer("a").connection, [frame])
    await settled()
    assert dialer.above.events == events
    assert sum(dialer.link.stats.dropped.values()) == 1
    dialer.send(1)
    await settled()
    assert hub.above.numbers() == [1]


@virtual
async def test_a_welcome_that_makes_no_sense_is_not_believed():
    for welcome in ({"received": 1, "grant": {}}, {"received": 0, "grant": [1]}, {"received": -1, "grant": {}}):
        network, heard = MemoryNetwork(), Recorder()
        acceptor = network.acceptor("hub:1", heard, host="hub")
        dialer = Dialer(network)
        await heard.until(lambda heard=heard: bool(heard.messages))
        acceptor.send(heard.messages[0].connection, [wire.pack_frame(wire.WELCOME, 1, 0, 0, welcome)])
        await settled()
        assert not dialer.link.is_welcome
        assert not dialer.link.peer.is_up
        assert dialer.above.events == []


def test_counters_are_bounded_whatever_peers_make_up():
    stats = LinkStats()
    for number in range(1000):
        stats.drop(f"{number} " + "x" * 10_000)
    assert len(stats.dropped) == 101
    assert stats.dropped["other"] == 900
    assert max(map(len, stats.dropped)) == 200


# -- faults of our own -------------------------------------------------------------------------------------------

BUG = ZeroDivisionError("a bug above the link")


@virtual
async def test_an_envelope_on_which_the_node_above_fails_costs_nothing_but_itself(caplog):
    _, hub, dialer = await met()
    hub.above.raising["envelope"] = BUG
    with caplog.at_level(logging.ERROR):
        dialer.send(1, 2, 3)
        await settled()
    assert hub.above.numbers() == [1, 2, 3]
    assert hub.link.stats.dropped == {"on_envelope raised ZeroDivisionError": 3}
    # The first and the second are logged, with the traceback; what repeats is logged ever more rarely.
    assert len(caplog.records) == 2
    assert all(record.exc_info and record.exc_info[1] is BUG for record in caplog.records)
    del hub.above.raising["envelope"]
    dialer.send(4)
    await settled()
    assert hub.above.numbers() == [1, 2, 3, 4]


@virtual
@pytest.mark.parametrize("callback", ["up", "beat", "down", "goodbye"])
async def test_a_bug_in_any_callback_of_the_acceptor_leaves_the_link_working(callback):
    network = MemoryNetwork()
    hub = Acceptor(network)
    hub.above.raising[callback] = BUG
    dialer = Dialer(network)
    await asyncio.sleep(1)
    dialer.send(1)
    await dialer.beat()
    dialer.link.peer.say_goodbye("see you")
    await settled()
    dialer.cut()
    dialer.send(2)
    await asyncio.sleep(1)
    assert hub.above.numbers() == [1, 2]
    assert (
        hub.link.stats.dropped[f"on_{'peer_' * (callback in ('up', 'down'))}{callback} raised ZeroDivisionError"] >= 1
    )


@virtual
async def test_a_beat_on_which_the_node_above_fails_is_not_answered_but_still_mends():
    _, hub, dialer = await met()
    hub.above.raising["beat"] = BUG
    dialer.lose(there=True)
    dialer.send(1)
    await settled()
    dialer.lose()
    await dialer.beat()
    assert dialer.above.count("answer") == 0  # a lease must not be renewed by a beat that did not count
    assert hub.above.numbers() == [1]


@virtual
async def test_facts_that_cannot_travel_cost_the_answer_only():
    _, hub, dialer = await met()
    hub.above.on_beat = lambda *_: {"not plain": object()}
    await dialer.beat()
    dialer.send(1)
    await settled()
    assert hub.above.numbers() == [1]
    assert dialer.above.count("answer") == 0


@virtual
async def test_a_bug_in_admit_turns_the_hello_away_until_it_is_gone():
    network = MemoryNetwork()
    hub = Acceptor(network)
    hub.above.raising["admit"] = BUG
    dialer = Dialer(network)
    await asyncio.sleep(1)
    assert [event[0::2] for event in dialer.above.events] == [("refused", False)]
    del hub.above.raising["admit"]
    await dialer.beat()
    assert dialer.link.is_welcome


@virtual
@pytest.mark.parametrize("callback", ["welcome", "up", "answer", "down", "envelope"])
async def test_a_bug_in_any_callback_of_the_dialer_leaves_the_link_working(callback):
    network = MemoryNetwork()
    hub, dialer = Acceptor(network), Dialer(network)
    dialer.above.raising[callback] = BUG
    await asyncio.sleep(1)
    hub.peer("a").send(an_envelope(1))
    await dialer.beat()
    dialer.cut()
    await asyncio.sleep(1)
    dialer.send(2)
    hub.peer("a").send(an_envelope(3))
    await settled()
    assert hub.above.numbers() == [2]
    assert dialer.above.numbers() == [1, 3]
    assert any(reason.endswith("raised ZeroDivisionError") for reason in dialer.link.stats.dropped)


@virtual
async def test_a_hello_that_cannot_be_built_is_tried_again_at_the_next_beat():
    network, broken = MemoryNetwork(), [True]
    hub = Acceptor(network)
    above = Above()
    link = LinkDialer(above, 1, lambda: {"name": object() if broken else "a"})
    link.attach(lambda handler: network.dialer("hub:1", handler, host="a"))
    await asyncio.sleep(1)
    link.beat({})
    assert not link.is_welcome
    broken.clear()
    await asyncio.sleep(1)
    link.beat({})
    await settled()
    assert link.is_welcome
    assert hub.above.count("admit") == 1


@virtual
async def test_a_message_that_no_peer_would_take_is_refused_at_once_and_stops_nothing():
    _, hub, dialer = await met()
    dialer.send(1)
    with pytest.raises(UnsendableMessage):
        dialer.link.peer.send(Envelope(CALL, 2, Address(2, 0, 1), 3, (0, 1, 0), method="m" * 1000))
    dialer.send(3)
    await settled()
    assert hub.above.numbers() == [1, 3]


class Failing:
    """A transport that raises while it is told to."""

    def __init__(self, inner):
        self.inner = inner
        self.fails = False

    def send(self, connection, frames):
        if self.fails:
            raise OSError("the socket is in a bad way")
        return self.inner.send(connection, frames)


@virtual
async def test_a_transport_that_raises_is_survived_and_what_it_did_not_take_is_sent_later():
    network = MemoryNetwork()
    hub, above, made = Acceptor(network), Above(), []
    link = LinkDialer(above, 1, lambda: {"name": "a"})
    link.attach(lambda handler: made.append(Failing(network.dialer("hub:1", handler, host="a"))) or made[0])
    await asyncio.sleep(1)
    made[0].fails = True
    link.peer.send(an_envelope(1))
    await settled()
    assert link.stats.dropped == {"sending raised OSError": 1}
    made[0].fails = False
    link.peer.send(an_envelope(2))
    await settled()
    assert hub.above.numbers() == [1, 2]
