"""Sessions: whatever the connection does, envelopes arrive in order, each once, whatever nonsense a peer says."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.conversations import HUGE, SESSION, SETTINGS, WINDOW_BYTES, Conversation, an_envelope, whole

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import CALL, MAX_METHOD_CHARS, Address, Envelope, MalformedFrame
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.session import Session, parse_frame, parse_items
from miles_agents.wire.short_frame import ACK, read_numbers


def small_session():
    return Session(SESSION, Conversation.pace)


Conversation.TestCase.settings = SETTINGS
TestConversation = Conversation.TestCase


def batches(session):
    found = []
    while (batch := session.next_batch(0.0)) is not None:
        found.append(batch)
    return found


def sent_numbers(batch):
    frame = parse_frame(batch.frames[0])
    return [whole(e).rid for e in parse_items(frame.payload, batch.frames[1:], 0.0)]


def test_messages_of_one_tick_travel_together_with_their_buffers():
    session = Session(SESSION)
    for number in range(1, 4):
        session.send(an_envelope(number, 10, [b"x" * number]))
    (batch,) = batches(session)
    assert sent_numbers(batch) == [1, 2, 3]
    assert batch.frames[1:] == [b"x", b"xx", b"xxx"]


def test_a_batch_is_bounded_in_messages_and_bytes():
    session = Session(SESSION)
    for number in range(1, wire.BATCH_MESSAGES + 2):
        session.send(an_envelope(number))
    assert [len(sent_numbers(batch)) for batch in batches(session)] == [wire.BATCH_MESSAGES, 1]
    session = Session(SESSION)
    for number in range(1, 4):
        session.send(an_envelope(number, wire.BATCH_BYTES // 2))
    assert [sent_numbers(batch) for batch in batches(session)] == [[1], [2], [3]]


def test_a_message_above_the_window_goes_alone():
    session = small_session()
    session.send(an_envelope(1, 3 * WINDOW_BYTES))
    session.send(an_envelope(2))
    assert [sent_numbers(batch) for batch in batches(session)] == [[1]]
    session.on_ack(1)
    assert [sent_numbers(batch) for batch in batches(session)] == [[2]]


def test_an_acknowledgement_of_what_was_never_sent_loses_nothing():
    session = small_session()
    for number in range(1, 9):
        session.send(an_envelope(number))
    assert [sent_numbers(batch) for batch in batches(session)] == [[1, 2, 3, 4, 5]]
    for lie in (6, 8, HUGE):
        with pytest.raises(MalformedFrame):
            session.on_ack(lie)
    session.on_ack(5)
    assert [sent_numbers(batch) for batch in batches(session)] == [[6, 7, 8]]


def test_what_was_sent_and_taken_back_can_still_be_acknowledged():
    session = small_session()
    for number in (1, 2, 3):
        session.send(an_envelope(number))
    batches(session)
    session.rewind(1)
    session.on_ack(2)
    assert [sent_numbers(batch) for batch in batches(session)] == [[3]]


def test_only_the_first_number_that_is_not_acknowledged_is_sent_again():
    session = small_session()
    for number in (1, 2, 3):
        session.send(an_envelope(number))
    batches(session)
    session.on_ack(1)
    for stale in (1, 3, 4, HUGE):
        session.on_resend(stale)
        assert batches(session) == []
    session.on_resend(2)
    assert [sent_numbers(batch) for batch in batches(session)] == [[2, 3]]


def test_a_repeated_frame_delivers_only_what_is_new_in_it():
    session = small_session()
    assert [e.rid for e in session.on_data(1, [an_envelope(1), an_envelope(2)], 1)] == [1, 2]
    assert session.on_data(1, [an_envelope(1)], 1) == []
    assert [e.rid for e in session.on_data(2, [an_envelope(2), an_envelope(3)], 1)] == [3]
    assert (session.received, session.stats.delivered, session.stats.repeated) == (3, 3, 2)


def test_acknowledgements_are_due_after_enough_messages_or_bytes():
    by_count, by_bytes = Session(SESSION), Session(SESSION)
    by_count.on_data(1, [an_envelope(n) for n in range(wire.ACK_MESSAGES - 1)], 1)
    assert not by_count.ack_due()
    by_count.on_data(wire.ACK_MESSAGES, [an_envelope(1)], 1)
    assert by_count.ack_due()
    by_bytes.on_data(1, [an_envelope(1)], wire.ACK_BYTES)
    assert by_bytes.ack_due()
    assert parse_frame(by_bytes.control(wire.ACK)[0]).ack == 1
    assert not by_bytes.ack_due()


def test_what_a_peer_would_refuse_gets_no_number_and_stops_nobody():
    session = small_session()
    with pytest.raises(UnsendableMessage):
        session.send(Envelope(CALL, 1, Address(2, 0, 1), 3, (0, 1, 0), method="m" * (MAX_METHOD_CHARS + 1)))
    with pytest.raises(UnsendableMessage):
        session.send(Envelope(CALL, 1, Address(2, 0, 1), 3, ()))
    session.send(an_envelope(2))
    (batch,) = batches(session)
    assert batch.first_seq == 1
    assert sent_numbers(batch) == [2]


def packed(*fields):
    return msgpack.packb(list(fields))


NESTED = b"\x91" * 600 + b"\xc0"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xff\xff",
        b"\x96\x01",
        NESTED,
        b"\x96" + NESTED + b"\x01" * 5,
        b"\x96\x01" + NESTED + b"\x01" * 4,
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xa4\xff\xff\xff\xff",
        b"\x81\x91\x01\x01",
        packed(1, 2, 3, 4, 5),
        packed(1, 2, 3, 4, 5, 6, 7),
        packed(2, wire.ACK, 1, 0, 0, None),
        packed(True, wire.ACK, 1, 0, 0, None),
        packed("x" * 10_000, wire.ACK, 1, 0, 0, None),
        packed(1, 0, 1, 0, 0, None),
        packed(1, 11, 1, 0, 0, None),
        packed(1, True, 1, 0, 0, None),
        packed(1, wire.ACK, -1, 0, 0, None),
        packed(1, wire.ACK, 1, -1, 0, None),
        packed(1, wire.ACK, 1, 0, -1, None),
        packed(1, wire.ACK, 1, 0, 2**63, None),
        packed(1, wire.ACK, 1, 0, 1.0, None),
        packed(1, wire.ACK, None, 0, 0, None),
        packed(1, wire.DATA, 1, 0, 0, []),
        packed(1, wire.RESEND, 1, 0, 0, None),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_not_a_link_frame_is_malformed_in_few_words(data):
    with pytest.raises(MalformedFrame) as caught:
        parse_frame(data)
    assert len(caught.value.evidence) < 200


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_malformed(data):
    try:
        frame = parse_frame(data)
    except MalformedFrame:
        return
    assert wire.HELLO <= frame.kind <= wire.GOODBYE


@pytest.mark.parametrize("payload", [None, 1, "x", b"x", {}, [None], [[]], [1], [[0] * 14]], ids=repr)
def test_what_is_not_a_list_of_envelopes_is_malformed(payload):
    with pytest.raises(MalformedFrame):
        parse_items(payload, [], 0.0)


def test_buffers_that_belong_to_nobody_are_malformed():
    session = small_session()
    session.send(an_envelope(1, 0, [b"mine"]))
    (batch,) = batches(session)
    payload = parse_frame(batch.frames[0]).payload
    assert len(parse_items(payload, [b"mine"], 0.0)) == 1
    for buffers in ([], [b"mine", b"more"], [b"not of this size"]):
        with pytest.raises(MalformedFrame):
            parse_items(payload, buffers, 0.0)


def test_a_frame_taken_shortly_counts_for_acknowledgements_like_any_other():
    short, long = Session(SESSION), Session(SESSION)
    for number in range(1, wire.ACK_MESSAGES + 1):
        assert not short.ack_due()
        assert short.take_next(number, 0, 10)
        long.on_data(number, [an_envelope(number)], 10)
    assert short.ack_due()
    assert long.ack_due()
    assert short.stats == long.stats
    by_bytes = Session(SESSION)
    assert by_bytes.take_next(1, 0, wire.ACK_BYTES)
    assert by_bytes.ack_due()


def test_only_what_is_next_and_honest_is_taken_shortly():
    session = small_session()
    assert not session.take_next(2, 0, 10)
    assert not session.take_next(1, 1, 10)
    assert session.take_next(1, 0, 10)
    assert not session.take_next(1, 0, 10)
    session.send(an_envelope(1))
    assert not session.take_next(2, 0, 10)
    assert (session.received, session.stats.delivered) == (1, 1)


def test_what_is_sent_at_once_acknowledges_and_is_kept_until_acknowledged():
    session = small_session()
    session.on_data(1, [an_envelope(1)] * wire.ACK_MESSAGES, 1)
    assert session.ack_due()
    batch = session.send_at_once(an_envelope(1), 0.0)
    assert read_numbers(batch.frames[0], wire.VERSION)[ACK] == wire.ACK_MESSAGES
    assert not session.ack_due()
    assert session.num_unacknowledged == 1
    session.rewind(1)
    assert [sent_numbers(again) for again in batches(session)] == [[1]]
    session.on_ack(1)
    assert session.num_unacknowledged == 0


def test_beyond_the_window_nothing_is_sent_at_once():
    session = small_session()
    assert session.send_at_once(an_envelope(1, 3 * WINDOW_BYTES), 0.0) is not None
    assert session.send_at_once(an_envelope(2), 0.0) is None
    assert batches(session) == []
    session.on_ack(1)
    assert session.send_at_once(an_envelope(3), 0.0) is None, "it would overtake"
    assert [sent_numbers(batch) for batch in batches(session)] == [[2, 3]]


def test_a_message_with_buffers_is_sent_at_once_in_the_long_form():
    (head, buffer) = small_session().send_at_once(an_envelope(1, 5, [b"mine"]), 0.0).frames
    assert buffer == b"mine"
    (item,) = parse_items(parse_frame(head).payload, [buffer], 0.0)
    assert item.rid == 1
