"""Two sessions that talk over the worst of connections, as a state machine; for any pace."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import CALL, Address, Envelope, MalformedFrame
from miles_agents.wire.fragments import Fragment, cut
from miles_agents.wire.session import Pace, Session, parse_frame, parse_items
from miles_agents.wire.short_frame import SHORT, Arrived, envelope_of, parse_short, read_numbers, short_of

SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
SESSION = 77
HUGE = 2**63 - 1
WINDOW_MESSAGES = 5
WINDOW_BYTES = 2000


def an_envelope(number, size=0, buffers=()):
    return Envelope(CALL, number, Address(2, 0, 1), 3, (0, 1, 0), body=bytes(size), buffers=list(buffers))


def whole(item):
    """The envelope of an item that is one, in whichever form it came."""
    return envelope_of(item.numbers, item.short, 0.0) if isinstance(item, Arrived) else item


class End:
    """One end with its side of the wire: does with frames what a link does."""

    def __init__(self, pace):
        self.session = Session(SESSION, pace)
        self.fragment_bytes = pace.fragment_bytes
        self.sent = []
        self.items = []  # what was numbered, in order; an envelope's last one completes it
        self.delivered = []
        self.acked = 0
        self.outbox = []  # frames on their way to the other end
        self.asked = set()  # numbers asked for since the last beat
        self.resend_causes = 0
        self.takes_the_short_way = True

    def accepts(self, size, buffers):
        """The next envelope, noted as sent."""
        envelope = an_envelope(len(self.sent) + 1, size, buffers)
        self.sent.append(envelope)
        self.items += [envelope] if self.fragment_bytes is None else cut(envelope, self.fragment_bytes)
        return envelope

    def send(self, size, buffers):
        self.session.send(self.accepts(size, buffers))

    def send_at_once(self, size, buffers):
        """As a peer does: what may not go now waits, and whatever the window allows goes. The batch if there is one."""
        envelope = self.accepts(size, buffers)
        could_go = not self.session.waiting
        batch = self.session.send_at_once(envelope, 0.0)
        if batch is None:
            self.flush()
            return None
        assert could_go, "it overtook what waits"
        assert self.session.last_sent == batch.first_seq == len(self.items)
        self.outbox.append(batch.frames)
        return batch

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
        if frames[0][:1] == SHORT:
            self.read_short(frames[0])
            return
        frame = parse_frame(frames[0])
        self.session.on_ack(frame.ack)
        self.acked = max(self.acked, frame.ack)
        if frame.kind == wire.DATA:
            items = parse_items(frame.payload, frames[1:], 0.0)
            self.delivered += map(whole, self.session.on_data(frame.seq, items, wire.total_bytes(frames)))
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

    def read_short(self, data):
        session, (_, seq, ack, envelope) = self.session, parse_short(data, wire.VERSION, 0.0)
        before = self.state()
        self.acked = max(self.acked, ack)
        if self.takes_the_short_way:
            if session.take_next(seq, ack, len(data)):
                assert session.received == before[0] + 1
                self.delivered.append(envelope)
                return
            assert self.state() == before
        session.on_ack(ack)
        arrived = Arrived(read_numbers(data, wire.VERSION), short_of(data))
        self.delivered += map(whole, session.on_data(seq, [arrived], len(data)))
        self.ask(session.missing(seq - 1))

    def state(self):
        session = self.session
        return (
            session.received,
            session.last_sent,
            session.num_unacknowledged,
            session.ack_due(),
            session.stats.delivered,
        )

    def resume(self, peer_received):
        self.session.resume(peer_received)
        self.acked = max(self.acked, peer_received)
        self.asked.clear()
        self.resend_causes += 1


class Conversation(RuleBasedStateMachine):
    """Two ends and a connection that drops, repeats, reorders and breaks."""

    pace = Pace(None, WINDOW_BYTES, WINDOW_MESSAGES)

    def __init__(self):
        super().__init__()
        self.ends = [End(self.pace), End(self.pace)]

    def pair(self, index):
        return self.ends[index], self.ends[1 - index]

    @rule(end=st.integers(0, 1), size=st.integers(0, 900), buffers=st.lists(st.binary(max_size=300), max_size=2))
    def send(self, end, size, buffers):
        self.ends[end].send(size, buffers)

    @rule(end=st.integers(0, 1), size=st.integers(0, 900), buffers=st.lists(st.binary(max_size=300), max_size=1))
    def send_at_once(self, end, size, buffers):
        self.ends[end].send_at_once(size, buffers)

    @rule(end=st.integers(0, 1), size=st.integers(0, 900))
    def find_what_is_sent_at_once_unsendable(self, end, size):
        sender = self.ends[end]
        batch = sender.send_at_once(size, [])
        if batch is not None:
            sender.outbox.pop()
            sender.session.rewind(batch.first_seq)
            sender.resend_causes += 1

    @rule(end=st.integers(0, 1), shortly=st.booleans())
    def read_short_frames(self, end, shortly):
        self.ends[end].takes_the_short_way = shortly

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
            victim.session.on_ack(len(victim.items) + beyond)
        with pytest.raises(MalformedFrame):
            victim.session.resume(len(victim.items) + beyond)
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
            came = sender.items[: receiver.session.received]
            assert len(came) == receiver.session.received
            assert len(receiver.delivered) == sum(not isinstance(item, Fragment) for item in came)

    @invariant()
    def the_window_holds(self):
        for end in self.ends:
            first = len(end.items) - end.session.num_unacknowledged
            in_flight = end.items[first : end.session.last_sent]
            assert len(in_flight) <= WINDOW_MESSAGES
            assert len(in_flight) <= 1 or sum(e.num_bytes for e in in_flight) <= WINDOW_BYTES

    @invariant()
    def what_is_acknowledged_is_released_and_nothing_else(self):
        for index in (0, 1):
            sender, receiver = self.pair(index)
            assert sender.session.num_unacknowledged == len(sender.items) - sender.acked
            assert sender.acked <= receiver.session.received

    @invariant()
    def resends_are_bounded_by_their_causes(self):
        for end in self.ends:
            assert end.session.stats.resent <= end.resend_causes * WINDOW_MESSAGES

    def teardown(self):
        """The connection heals and beats flow: everything arrives, and is released."""
        rounds = 3 + sum(len(end.items) for end in self.ends)
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
