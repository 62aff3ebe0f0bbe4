"""Links on the transport in memory: who is admitted, what goes on after a break, how it ends."""

import asyncio

import pytest
from support.links import Acceptor, Dialer, Stranger, an_envelope, met, settled, virtual

from miles_agents.wire import session as wire
from miles_agents.wire.link_handlers import Refusal
from miles_agents.wire.memory_transport import Faults, MemoryNetwork

# -- HELLO -------------------------------------------------------------------------------------------------------


@virtual
async def test_hello_is_admitted_and_welcomed_with_the_grant():
    _, hub, dialer = await met()
    assert hub.above.events == [("admit", "a", "key-a", 1), ("up", "a", False)]
    assert dialer.above.events == [("welcome", {"seat": "a"}), ("up", "dialed", False)]
    assert hub.peer("a").is_up and dialer.link.peer.is_up


@virtual
async def test_both_sides_talk_in_order():
    _, hub, dialer = await met()
    dialer.send(*range(300))
    for number in range(300):
        hub.peer("a").send(an_envelope(number, 10, [bytes(100_000)] if number % 100 == 0 else []))
    await settled()
    assert hub.above.numbers() == dialer.above.numbers() == list(range(300))


@virtual
async def test_a_final_refusal_is_told_once_and_ends_the_greetings():
    network = MemoryNetwork()
    hub = Acceptor(network)
    hub.above.verdict = Refusal("not on the list")
    dialer = Dialer(network)
    await asyncio.sleep(1)
    await dialer.beat(5)
    assert dialer.above.events == [("refused", "not on the list", True)]
    assert hub.above.count("admit") == 1
    assert hub.link.peers == []
    assert not dialer.link.is_welcome
    assert hub.link.stats.dropped == {"HELLO refused: not on the list": 1}


@virtual
async def test_after_a_refusal_that_is_not_final_the_dialer_greets_at_its_beats():
    network = MemoryNetwork()
    hub = Acceptor(network)
    hub.above.verdict = Refusal("come later", final=False)
    dialer = Dialer(network)
    await asyncio.sleep(1)
    await dialer.beat(3)
    assert dialer.above.count("refused") == 4
    hub.above.verdict = None
    await dialer.beat()
    assert dialer.link.is_welcome


@virtual
async def test_a_refused_dialer_ignores_a_late_welcome():
    network = MemoryNetwork()
    hub = Acceptor(network)
    hub.above.verdict = Refusal("no")
    dialer = Dialer(network)
    await asyncio.sleep(1)
    (connection,) = network.connections("a", "hub")
    late = wire.pack_frame(wire.WELCOME, 1, 0, 0, {"received": 0, "grant": {}})
    assert hub.link.transport.send(connection, [late])
    await settled()
    assert not dialer.link.peer.is_up
    assert dialer.above.events == [("refused", "no", True)]


@virtual
@pytest.mark.parametrize("lost", ["there", "back"])
async def test_a_lost_hello_or_welcome_is_mended_by_beats(lost):
    network = MemoryNetwork()
    hub, dialer = Acceptor(network), Dialer(network)
    dialer.lose(**{lost: True})
    dialer.send(1)
    await asyncio.sleep(1)
    await dialer.beat(2)
    for peer in hub.link.peers:
        peer.send(an_envelope(2))
    await dialer.beat()
    assert not dialer.link.is_welcome
    dialer.lose()
    await dialer.beat(3)
    # The grant comes with whichever WELCOME arrives first, and it is the dialer's first.
    assert dialer.above.events[:2] == [("welcome", {"seat": "a"}), ("up", "dialed", False)]
    assert dialer.above.count("welcome") == 1
    assert hub.above.count("admit") == 1
    assert hub.above.numbers() == [1]
    assert dialer.above.numbers() == ([2] if lost == "back" else [])


@virtual
async def test_a_hello_that_claims_to_be_welcome_where_nobody_knows_it_is_refused_for_good():
    network, hub, dialer = await met()
    hub.link.close()
    replaced = Acceptor(network)
    await dialer.beat(10)
    assert dialer.above.events[-1][0] == "refused"
    assert dialer.above.count("refused") == 1
    assert replaced.above.events == []
    assert not dialer.link.is_welcome
    assert replaced.link.peers == []


@virtual
async def test_a_new_acceptor_takes_a_dialer_that_was_never_welcomed():
    network = MemoryNetwork()
    hub, dialer = Acceptor(network), Dialer(network)
    dialer.lose(back=True)
    await asyncio.sleep(1)
    assert hub.above.count("up") == 1
    hub.link.close()
    dialer.lose()
    replaced = Acceptor(network)
    await dialer.beat(10)
    assert dialer.link.is_welcome
    assert replaced.above.count("admit") == 1


@virtual
@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "hello",
        {},
        {"received": "1"},
        {"received": -1},
        {"received": True},
        {"received": 1},
        {"received": 2**62},
        {"received": None, "welcomed": True},
    ],
    ids=repr,
)
async def test_a_hello_that_makes_no_sense_is_counted_and_nobody_is_asked(payload):
    network = MemoryNetwork()
    hub, stranger = Acceptor(network), Stranger(network)
    await settled()
    stranger.say(wire.HELLO, 9, payload)
    await settled()
    assert hub.above.events == []
    assert sum(hub.link.stats.dropped.values()) == 1


@virtual
async def test_a_hello_that_has_received_what_was_never_sent_does_not_move_the_connection():
    _, hub, dialer = await met()
    before = hub.peer("a").connection
    hub.peer("a").send(an_envelope(1))
    await settled()
    intruder = Stranger(dialer.network, "x", "key-a")  # the right key, but nonsense
    await settled()
    intruder.say(wire.HELLO, 1, {"name": "a", "received": 10, "welcomed": True})
    await settled()
    assert hub.peer("a").connection == before
    hub.peer("a").send(an_envelope(2))
    await settled()
    assert dialer.above.numbers() == [1, 2]


# -- breaks ------------------------------------------------------------------------------------------------------


@virtual
async def test_a_session_goes_on_after_a_reconnect_and_nothing_is_lost_or_repeated():
    _, hub, dialer = await met()
    dialer.send(1, 2)
    await settled()
    dialer.lose(there=True, back=True)
    dialer.send(3, 4)
    hub.peer("a").send(an_envelope(7))
    await settled()
    dialer.cut()
    await settled()
    dialer.lose()
    dialer.send(5)
    hub.peer("a").send(an_envelope(8))
    assert not dialer.link.peer.is_up
    await asyncio.sleep(1)
    assert hub.above.numbers() == [1, 2, 3, 4, 5]
    assert dialer.above.numbers() == [7, 8]
    assert [e for e in hub.above.events if e[0] in ("up", "down")] == [
        ("up", "a", False),
        ("down", "a"),
        ("up", "a", True),
    ]
    assert dialer.above.events.count(("up", "dialed", True)) == 1
    assert dialer.above.count("welcome") == 1


@virtual
async def test_loss_is_mended_by_the_next_frame_or_by_a_beat():
    _, hub, dialer = await met()
    dialer.lose(there=True)
    dialer.send(1)
    await settled()
    dialer.lose()
    dialer.send(2)
    await settled()
    assert hub.above.numbers() == [1, 2]
    dialer.lose(there=True, back=True)
    dialer.send(3)
    hub.peer("a").send(an_envelope(9))
    await settled()
    dialer.lose()
    await dialer.beat()
    assert hub.above.numbers() == [1, 2, 3]
    assert dialer.above.numbers() == [9]


@virtual
async def test_a_bad_network_loses_repeats_and_reorders_and_all_arrives_once():
    network, hub, dialer = await met()
    bad = Faults(drop=0.2, duplicate=0.2, reorder=0.3, reorder_s=0.02)
    network.set_faults("a", "hub", bad)
    network.set_faults("hub", "a", bad)
    for number in range(200):
        dialer.send(number)
        hub.peer("a").send(an_envelope(number))
        await asyncio.sleep(0.02)
        if number % 40 == 20:
            dialer.cut()
        if number % 10 == 0:
            dialer.link.beat({})
    dialer.lose()
    await dialer.beat(5)
    assert hub.above.numbers() == dialer.above.numbers() == list(range(200))
    assert dialer.link.peer.session.num_unacknowledged == hub.peer("a").session.num_unacknowledged == 0


@virtual
async def test_a_frame_that_is_repeated_is_read_once():
    _, hub, dialer = await met()
    dialer.network.set_faults("a", "hub", Faults(duplicate=1.0))
    dialer.send(1, 2)
    await settled()
    dialer.send(3)
    await dialer.beat()
    assert hub.above.numbers() == [1, 2, 3]
    assert hub.peer("a").session.stats.repeated == 3


@virtual
async def test_a_repeated_hello_of_long_ago_changes_nothing():
    _, hub, dialer = await met()
    dialer.send(1, 2)
    hub.peer("a").send(an_envelope(8))
    await dialer.beat()
    dialer.say(wire.HELLO, {"name": "a", "received": 0, "welcomed": False})
    await settled()
    dialer.send(3)
    hub.peer("a").send(an_envelope(9))
    await settled()
    assert hub.above.numbers() == [1, 2, 3]
    assert dialer.above.numbers() == [8, 9]
    assert hub.above.count("admit") == 1


@virtual
async def test_who_speaks_before_hello_is_told_so_and_greets_again():
    _, hub, dialer = await met()
    peer = hub.peer("a")
    hub.link.on_down(peer.connection)  # the transport thinks so; the dialer heard nothing
    assert not peer.is_up
    dialer.send(1)
    await asyncio.sleep(1)
    assert peer.is_up
    assert hub.above.numbers() == [1]
    assert hub.link.stats.dropped == {"frame before HELLO": 1}


@virtual
async def test_a_stranger_that_never_greets_gets_nothing_but_reset():
    network = MemoryNetwork()
    hub, stranger = Acceptor(network), Stranger(network)
    await settled()
    for kind in set(range(wire.HELLO, wire.GOODBYE + 1)) - {wire.HELLO}:
        stranger.say(kind, 1, [], seq=1)
    await settled()
    assert set(stranger.kinds()) == {wire.RESET}
    assert hub.above.events == []


@virtual
async def test_a_backlog_above_the_window_drains_as_acknowledgements_come():
    _, hub, dialer = await met()
    count = wire.WINDOW_MESSAGES * 2 + 10
    dialer.send(*range(count))
    await settled()
    assert hub.above.numbers() == list(range(count))


@virtual
async def test_large_bodies_are_acknowledged_without_waiting_for_a_beat():
    _, hub, dialer = await met()
    size = wire.WINDOW_BYTES // 4
    for number in range(6):
        dialer.link.peer.send(an_envelope(number, size))
    await settled()
    assert hub.above.numbers() == list(range(6))


# -- beats and ends ----------------------------------------------------------------------------------------------


@virtual
async def test_a_beat_is_answered_with_its_id_and_the_facts_from_above():
    _, hub, dialer = await met()
    first = dialer.link.beat({"load": 1})
    second = dialer.link.beat({})
    await settled()
    assert hub.above.events[-2:] == [("beat", first, {"load": 1}), ("beat", second, {})]
    assert dialer.above.events[-2:] == [("answer", n, {"answered": n}) for n in (first, second)]


@virtual
async def test_goodbye_comes_after_all_that_was_said_before():
    _, hub, dialer = await met()
    dialer.send(1, 2)
    dialer.link.peer.say_goodbye("done")
    dialer.link.close()
    await settled()
    assert hub.above.numbers() == [1, 2]
    assert ("goodbye", "a", "done") in hub.above.events
    assert hub.above.events[-1] == ("down", "a")


@virtual
async def test_after_end_session_the_peer_is_refused():
    _, hub, dialer = await met()
    hub.link.end_session(hub.peer("a"))
    assert hub.link.peers == []
    dialer.send(1)
    await asyncio.sleep(1)
    assert hub.above.numbers() == []
    assert dialer.above.events[-1][0] == "refused"
    assert not dialer.link.is_welcome
    await dialer.beat(3)
    assert hub.above.count("beat") == 0


@virtual
async def test_a_message_that_ends_the_session_is_the_last_one_that_is_heard():
    _, hub, dialer = await met()
    hub.above.acts["envelope"] = hub.link.end_session
    dialer.send(1, 2, 3)
    await asyncio.sleep(1)
    assert hub.above.numbers() == [1]


@virtual
async def test_nothing_is_called_back_after_close_not_even_the_rest_of_a_batch():
    _, hub, dialer = await met()
    hub.above.acts["envelope"] = lambda _: hub.link.close()
    dialer.send(1, 2, 3)
    await asyncio.sleep(1)
    assert hub.above.events[-1] == ("envelope", 1)
