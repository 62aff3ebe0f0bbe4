"""Short frames say what the long ones say; what is none is counted and changes nothing."""

import math
import struct
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.ids import case_id
from support.links import Acceptor, Stranger, an_envelope, met, settled, virtual

from miles_agents.wire import envelope as wire
from miles_agents.wire import session
from miles_agents.wire import short_frame as short
from miles_agents.wire.envelope import Address, Envelope, MalformedFrame, check_sendable
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.memory_transport import MemoryNetwork
from miles_agents.wire.session import VERSION, Session, parse_frame, parse_items
from miles_agents.wire.short_frame import (
    envelope_of,
    pack_each,
    pack_envelope,
    pack_short,
    packed_of,
    parse_short,
    read_numbers,
    short_of,
)
from miles_agents.wire.transport import ZERO_COPY_BYTES

NOW = 1000.0
HEAD_BYTES = 32
naturals = st.one_of(st.integers(0, 300), st.integers(0, wire.MAX_NUMBER))
methods = st.text(st.characters(exclude_categories=["Cs"]), max_size=wire.MAX_METHOD_CHARS)
one_target = st.tuples(naturals, naturals, naturals)
envelopes = st.builds(
    Envelope,
    kind=st.sampled_from(sorted(wire.KIND_NAMES)),
    rid=naturals,
    source=st.builds(Address, naturals, naturals, naturals),
    mesh=naturals,
    targets=one_target,
    size=naturals,
    method=methods,
    deadline=st.one_of(st.none(), st.floats(NOW - 10, NOW + 1e6), st.just(math.inf)),
    flags=st.integers(0, 255),
    trace=naturals,
    body=st.binary(max_size=100),
)


def as_long(envelope, now=NOW):
    """What the next hop would see of the long form."""
    frame = parse_frame(session.pack_frame(session.DATA, 1, 1, 0, [envelope.to_plain(now)]))
    (item,) = parse_items(frame.payload, list(envelope.buffers), now)
    assert type(item) is Envelope
    return item


def as_item(packed, now=NOW):
    """What the next hop would see of a short envelope that travels with others."""
    frame = parse_frame(session.pack_frame(session.DATA, 1, 1, 0, [packed.short]))
    (item,) = parse_items(frame.payload, [], now)
    return envelope_of(item.numbers, item.short, now)


def as_short(envelope, now=NOW):
    packed = pack_envelope(envelope, now)
    assert packed is not None
    return parse_short(pack_short(VERSION, 5, 6, 7, packed), VERSION, now)


@given(envelopes)
def test_what_packs_short_arrives_as_by_the_long_form(envelope):
    assume(len(envelope.method.encode()) <= wire.MAX_METHOD_CHARS)
    check_sendable(envelope)
    *numbers, came = as_short(envelope)
    assert numbers == [5, 6, 7]
    assert came == as_long(envelope)
    assert came == replace(envelope, deadline=came.deadline)
    assert came.num_bytes == envelope.num_bytes
    assert type(came.source) is Address
    if envelope.deadline is None:
        assert came.deadline is None


@given(remaining=st.floats(-1e6, 1e6), hops=st.lists(st.floats(0, 100), max_size=5))
def test_each_hop_takes_off_a_deadline_what_it_spent(remaining, hops):
    envelope, clock, left = replace(an_envelope(1), deadline=NOW + remaining), NOW, remaining
    for spent in hops:
        *_, envelope = as_short(envelope, clock)
        clock += spent
        left = max(0.0, left) - spent
        assert envelope.deadline - clock == pytest.approx(left, abs=0.01)


@given(envelopes, st.integers(1, wire.MAX_NUMBER), st.integers(0, wire.MAX_NUMBER))
def test_what_came_short_is_passed_on_as_it_came_but_for_the_head(envelope, seq, ack):
    assume(len(envelope.method.encode()) <= wire.MAX_METHOD_CHARS and envelope.deadline is None)
    frame = pack_short(VERSION, 5, 6, 7, pack_envelope(envelope, NOW))
    *_, came = parse_short(frame, VERSION, NOW)
    onward = pack_short(VERSION, 99, seq, ack, pack_envelope(came, NOW + 5))
    assert onward[HEAD_BYTES:] == frame[HEAD_BYTES:]
    assert read_numbers(onward, VERSION)[short.SESSION : short.ACK + 1] == (99, seq, ack)
    relayed = packed_of(short_of(frame))
    assert pack_short(VERSION, 99, seq, ack, relayed.short) == onward
    assert (relayed.buffers, relayed.num_bytes) == ([], envelope.num_bytes)
    assert as_item(relayed) == envelope
    check_sendable(came)


@given(envelopes, st.lists(one_target, min_size=2, max_size=4, unique=True))
def test_a_call_for_many_is_spread_as_one_short_envelope_each(envelope, targets):
    many = replace(envelope, targets=tuple(number for target in targets for number in target), deadline=None)
    each = pack_each(many)
    if len(envelope.method.encode()) > wire.MAX_METHOD_CHARS:
        assert each is None
    else:
        assert [as_item(packed) for packed in each] == [replace(many, targets=target) for target in targets]


@pytest.mark.parametrize(
    "changes", [{"flags": 256}, {"buffers": [b"x"]}, {"deadline": NOW}, {"method": "\ud800"}], ids=str
)
def test_a_call_for_many_that_does_not_fit_is_not_spread_so(changes):
    assert pack_each(replace(an_envelope(1), targets=(0, 1, 0, 1, 1, 1), **changes)) is None


@given(envelopes)
def test_what_came_short_can_still_go_the_long_way(envelope):
    assume(len(envelope.method.encode()) <= wire.MAX_METHOD_CHARS)
    *_, came = as_short(envelope)
    assert as_long(came) == came


def odd(**changes):
    return pytest.param(changes, id=next(iter(changes)) + f" {case_id(next(iter(changes.values())))}")


@pytest.mark.parametrize(
    "changes",
    [
        odd(buffers=[b"x"]),
        odd(targets=(0, 1, 0, 1, 1, 1)),
        odd(flags=256),
        odd(method="é" * 101),
        odd(body=bytes(ZERO_COPY_BYTES)),
    ],
)
def test_what_does_not_fit_goes_the_long_way(changes):
    envelope = replace(an_envelope(1), **changes)
    assert pack_envelope(envelope, NOW) is None
    check_sendable(envelope)
    assert as_long(envelope) == envelope


@pytest.mark.parametrize(
    "changes",
    [
        *(odd(kind=kind) for kind in (0, 9, 255, 300, -1)),
        *(odd(rid=number) for number in (-1, 2**63, 2**64, True, 1.0, None)),
        odd(source=Address(0, 2**63, 0)),
        odd(mesh=2**64 - 1),
        odd(targets=()),
        odd(targets=(0, 1)),
        odd(targets=(0, 2**63, 1)),
        odd(size=-1),
        odd(trace=2**63),
        odd(flags=True),
        odd(method="\ud800"),
        odd(method="m" * 201),
        odd(deadline=math.nan),
        odd(body=bytearray(b"x")),
        odd(body=memoryview(b"x")),
    ],
)
def test_what_no_peer_would_take_is_refused_by_both_ways_and_gets_no_number(changes):
    envelope = replace(an_envelope(1), **changes)
    assert pack_envelope(envelope, NOW) is None
    for send in (lambda s: s.send(envelope), lambda s: s.send_at_once(envelope, NOW)):
        one = Session(1)
        with pytest.raises(UnsendableMessage):
            send(one)
        assert (one.last_sent, one.num_unacknowledged) == (0, 0)


@given(st.integers(0, ZERO_COPY_BYTES), st.integers(0, wire.MAX_METHOD_CHARS))
def test_a_short_frame_is_always_small_enough_to_arrive_as_bytes(body_bytes, method_chars):
    packed = pack_envelope(replace(an_envelope(1, body_bytes), method="m" * method_chars), NOW)
    if packed is None:
        assert body_bytes > ZERO_COPY_BYTES - 1024
    else:
        assert len(pack_short(VERSION, 1, 1, 0, packed)) < ZERO_COPY_BYTES


# -- hostile ones ---------------------------------------------------------------------------------------------------

GOOD = pack_short(VERSION, 1, 1, 0, pack_envelope(replace(an_envelope(1), method="work", body=b"body"), NOW))
METHOD_AT, NUMBERS_AT = 128, 40


def with_byte(at, value):
    return GOOD[:at] + bytes([value]) + GOOD[at + 1 :]


def with_number(at, value):
    return GOOD[:at] + struct.pack("<Q", value) + GOOD[at + 8 :]


HOSTILE = {
    "another version": with_byte(1, VERSION + 1),
    "kind 0": with_byte(32, 0),
    "kind 9": with_byte(32, 9),
    "kind 255": with_byte(32, 255),
    "number 0": with_number(16, 0),
    **{f"a number too large at {at}": with_number(at, 2**63) for at in (8, 16, 24, *range(NUMBERS_AT, METHOD_AT, 8))},
    "the largest numbers": GOOD[:8] + b"\xff" * 24 + GOOD[32:],
    "too long a deadline": with_number(METHOD_AT - 8, wire.MAX_REMAINING_MS + 2),
    "too long a method": with_byte(34, wire.MAX_METHOD_CHARS + 1) + bytes(300),
    "a method that is not text": with_byte(METHOD_AT, 0xFF),
    "a method cut in half a character": with_byte(METHOD_AT + 3, 0xC3),
    "ends in its method": GOOD[: METHOD_AT + 3],
    "ends before its method": GOOD[:METHOD_AT],
    "ends in its numbers": GOOD[: METHOD_AT - 1],
    "ends after its mark": GOOD[:1],
}


def test_the_example_is_good():
    assert parse_short(GOOD, VERSION, NOW)[3].method == "work"


@pytest.mark.parametrize("short", [data[HEAD_BYTES:] for data in HOSTILE.values() if data[:32] == GOOD[:32]])
def test_what_is_no_short_envelope_is_malformed_among_others_too(short):
    payload = [GOOD[HEAD_BYTES:], short]
    with pytest.raises(MalformedFrame):
        parse_items(payload, [], NOW)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_short_frame_is_malformed_in_few_words(data):
    with pytest.raises(MalformedFrame) as caught:
        read_numbers(data, VERSION)
    assert len(caught.value.evidence) < 200


@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_any_bytes_are_an_envelope_that_can_be_passed_on_or_malformed(data, kept):
    for frame in (bytes([short.MARK]) + data, GOOD[:kept] + data):
        try:
            *_, came = parse_short(frame, VERSION, NOW)
        except MalformedFrame:
            continue
        assert as_long(came) == replace(came, deadline=as_long(came).deadline)
        check_sendable(replace(came, short=None))
        assert as_item(packed_of(short_of(frame))) == came


@virtual
async def test_hostile_short_frames_are_counted_and_nothing_else_happens():
    _, hub, dialer = await met()
    before = hub.link.peers[0].session.received
    for data in HOSTILE.values():
        dialer.raw(data)
    await settled()
    assert sum(hub.link.stats.dropped.values()) == len(HOSTILE)
    assert hub.above.numbers() == []
    assert hub.link.peers[0].session.received == before
    dialer.send(1, 2)
    await settled()
    assert hub.above.numbers() == [1, 2]


@virtual
async def test_short_frames_of_another_session_or_before_hello_or_with_lies_change_nothing():
    _, hub, dialer = await met()
    own = dialer.link.peer.session.session_id
    packed = pack_envelope(an_envelope(66), NOW)
    dialer.raw(pack_short(VERSION, own + 1, 1, 0, packed))
    dialer.raw(pack_short(VERSION, own, 1, 12345, packed))  # acknowledges what was never sent
    await settled()
    assert hub.link.stats.dropped == {"frame of another session": 1, "a peer acknowledges what was never sent": 1}
    dialer.raw(pack_short(VERSION, own, 5, 0, packed))  # a gap
    await settled()
    assert hub.above.numbers() == []
    dialer.send(1)
    dialer.raw(pack_short(VERSION, own, 1, 0, packed))  # a number that was already taken
    await settled()
    assert hub.above.numbers() == [1]


@virtual
async def test_a_short_frame_before_hello_is_answered_with_reset():
    network = MemoryNetwork()
    hub = Acceptor(network)
    stranger = Stranger(network)
    await settled()
    assert stranger.transport.send(b"", [GOOD])
    await settled()
    assert stranger.kinds() == [session.RESET]
    assert hub.link.stats.dropped == {"frame before HELLO": 1}


@virtual
async def test_what_a_hop_relays_can_be_sent_again_with_others_the_long_way():
    _, hub, dialer = await met()
    dialer.lose(there=True)
    for number in (1, 2, 3):
        dialer.link.peer.send(packed_of(pack_envelope(an_envelope(number, 10), NOW)))
    await settled()
    assert hub.above.numbers() == []
    dialer.lose(there=False)
    await dialer.beat(3)
    assert hub.above.numbers() == [1, 2, 3]
    assert dialer.link.peer.session.num_unacknowledged == 0
