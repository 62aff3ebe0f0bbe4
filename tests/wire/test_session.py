"""Sessions: whatever the connection does, envelopes arrive in order, each once, whatever nonsense a peer says."""

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import CALL, MAX_METHOD_CHARS, Address, Envelope, MalformedFrame
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.session import Pace, Session, parse_frame, parse_items

SESSION = 77
HUGE = 2**63 - 1
WINDOW_MESSAGES = 5
WINDOW_BYTES = 2000


def an_envelope(number, size=0, buffers=()):
    return Envelope(CALL, number, Address(2, 0, 1), 3, (0, 1, 0), body=bytes(size), buffers=list(buffers))


def small_session():
    return Session(SESSION, Pace(None, WINDOW_BYTES, WINDOW_MESSAGES))


class End:
    """One end with its side of the wire: does with frames what a link does."""

    def __init__(self, name):
        self.name = name
        self.session = small_session()
        self.sent = []
        self.delivered = []
        self.acked = 0
        self.outbox = []  # frames on their way to the other end
        self.asked = set()  # numbers asked for since the last beat
        self.resend_causes = 0

    def send(self, size, buffers):
        envelope = an_envelope(len(self.sent) + 1, size, buffers)
        self.session.send(envelope)
        self.sent.append(envelope)

    def flush(self):
        while (batch := self.session.next_batch(0.0)) is not None:
            self.outbox.append(batch.frames)

    def control(self, kind, payload=None, seq=0):
        self.outbox.append(self.session.control(kind, payload, seq=seq))

    def ask(self, missing):
        if missing is not None:
            assert missing not in self.asked, "asked twice for one gap without a beat in between"
            self.asked.add(missing)
            self.control(wire.RESEND, seq=missing)

    def read(self, frames):
        frame = parse_frame(frames[0])
        self.session.on_ack(frame.ack)
        self.acked = max(self.acked, frame.ack)
        if frame.kind == wire.DATA:
            envelopes = parse_items(frame.payload, frames[1:], 0.0)
            self.delivered += self.session.on_data(frame.seq, envelopes, wire.total_bytes(frames))
            self.ask(self.session.missing(frame.seq - 1))
        elif frame.kind == wire.RESEND:
            self.resend_causes += 1
            self.session.on_resend(frame.seq)
        elif frame.kind in (wire.BEAT, wire.ANSWER):
            if frame.kind == wire.BEAT:
                self.control(wire.ANSWER, [0, {}], seq=self.session.last_sent)
            self.session.forget_asked()
            self.asked.clear()
            self.ask(self.session.missing(frame.seq))

    def resume(self, peer_received):
        self.session.resume(peer_received)
        self.acked = max(self.acked, peer_received)
        self.asked.clear()
        self.resend_causes += 1


class Conversation(RuleBasedStateMachine):
    """Two ends and a connection that drops, repeats, reorders and breaks."""

    def __init__(self):
        super().__init__()
        self.ends = [End("dialer"), End("acceptor")]

    def pair(self, index):
        return self.ends[index], self.ends[1 - index]

    @rule(end=st.integers(0, 1), size=st.integers(0, 900), buffers=st.lists(st.binary(max_size=300), max_size=2))
    def send(self, end, size, buffers):
        self.ends[end].send(size, buffers)

    @rule(end=st.integers(0, 1))
    def flush(self, end):
        self.ends[end].flush()

    @rule(end=st.integers(0, 1))
    def find_a_batch_unsendable(self, end):
        sender = self.ends[end]
        batch = sender.session.next_batch(0.0)
        if batch is not None:
            sender.session.rewind(batch.first_seq)
            sender.resend_causes += 1

    @precondition(lambda self: any(end.outbox for end in self.ends))
    @rule(data=st.data())
    def deliver_any(self, data):
        index = data.draw(st.sampled_from([i for i in (0, 1) if self.ends[i].outbox]))
        sender, receiver = self.pair(index)
        receiver.read(sender.outbox.pop(data.draw(st.integers(0, len(sender.outbox) - 1))))

    @rule(end=st.integers(0, 1))
    def deliver_all_in_order(self, end):
        sender, receiver = self.pair(end)
        frames, sender.outbox = sender.outbox, []
        for message in frames:
            receiver.read(message)

    @precondition(lambda self: any(end.outbox for end in self.ends))
    @rule(data=st.data(), repeat=st.booleans())
    def drop_or_repeat(self, data, repeat):
        sender = self.ends[data.draw(st.sampled_from([i for i in (0, 1) if self.ends[i].outbox]))]
        position = data.draw(st.integers(0, len(sender.outbox) - 1))
        if repeat:
            sender.outbox.insert(data.draw(st.integers(0, len(sender.outbox))), sender.outbox[position])
        else:
            del sender.outbox[position]

    @rule()
    def beat(self):
        dialer = self.ends[0]
        dialer.control(wire.BEAT, [0, {}], seq=dialer.session.last_sent)

    @rule(end=st.integers(0, 1))
    def acknowledge(self, end):
        self.ends[end].control(wire.ACK)

    @rule()
    def reconnect(self):
        for end in self.ends:
            end.outbox.clear()
        dialer, acceptor = self.ends
        acceptor.resume(dialer.session.received)
        dialer.resume(acceptor.session.received)

    @rule(end=st.integers(0, 1), beyond=st.integers(1, HUGE // 2))
    def lie_about_what_was_received(self, end, beyond):
        victim = self.ends[end]
        before = (victim.session.num_unacknowledged, victim.session.last_sent)
        with pytest.raises(MalformedFrame):
            victim.session.on_ack(len(victim.sent) + beyond)
        with pytest.raises(MalformedFrame):
            victim.session.resume(len(victim.sent) + beyond)
        assert (victim.session.num_unacknowledged, victim.session.last_sent) == before

    @rule(end=st.integers(0, 1), seq=st.one_of(st.integers(1, 50), st.just(HUGE)))
    def ask_for_nonsense(self, end, seq):
        self.ends[end].resend_causes += 1
        self.ends[end].session.on_resend(seq)

    @rule(end=st.integers(0, 1), beyond=st.one_of(st.integers(2, 50), st.just(2**62)))
    def claim_numbers_that_come_much_later(self, end, beyond):
        session = self.ends[end].session
        assert session.on_data(session.received + beyond, [an_envelope(666)], 10) == []

    @invariant()
    def each_envelope_is_delivered_once_in_order_and_not_before_it_was_sent(self):
        for index in (0, 1):
            sender, receiver = self.pair(index)
            assert receiver.delivered == sender.sent[: len(receiver.delivered)]
            assert receiver.session.received == len(receiver.delivered) <= len(sender.sent)

    @invariant()
    def the_window_holds(self):
        for end in self.ends:
            first = len(end.sent) - end.session.num_unacknowledged
            in_flight = end.sent[first : end.session.last_sent]
            assert len(in_flight) <= WINDOW_MESSAGES
            assert len(in_flight) <= 1 or sum(e.num_bytes for e in in_flight) <= WINDOW_BYTES

    @invariant()
    def what_is_acknowledged_is_released_and_nothing_else(self):
        for index in (0, 1):
            sender, receiver = self.pair(index)
            assert sender.session.num_unacknowledged == len(sender.sent) - sender.acked
            assert sender.acked <= receiver.session.received

    @invariant()
    def resends_are_bounded_by_their_causes(self):
        for end in self.ends:
            assert end.session.stats.resent <= end.resend_causes * WINDOW_MESSAGES

    def teardown(self):
        """The connection heals and beats flow: everything arrives, and is released."""
        rounds = 3 + sum(len(end.sent) for end in self.ends)
        for _ in range(rounds):
            self.beat()
            for index in (0, 1):
                self.deliver_all_in_order(index)
                self.ends[1 - index].flush()
            for index in (0, 1):
                self.deliver_all_in_order(index)
            if not any(end.session.num_unacknowledged or end.outbox for end in self.ends):
                break
        for index in (0, 1):
            sender, receiver = self.pair(index)
            assert receiver.delivered == sender.sent
            assert sender.session.num_unacknowledged == 0
        self.resends_are_bounded_by_their_causes()


Conversation.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestConversation = Conversation.TestCase


def batches(session):
    found = []
    while (batch := session.next_batch(0.0)) is not None:
        found.append(batch)
    return found


def sent_numbers(batch):
    frame = parse_frame(batch.frames[0])
    return [e.rid for e in parse_items(frame.payload, batch.frames[1:], 0.0)]


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
