"""What a hop passed on leaves its list exactly once: with its answer, or with a death at either end."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.rpc.inflight import MAX_METHODS, InFlight, RequestKey, expects_answer, is_one_way
from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import Address, Envelope

SENDERS = [Address(0, 0, 1), Address(3, 1, 11), Address(3, 1, 12)]
RECEIVERS = [Address(2, rank, 20 + rank) for rank in range(3)]


def call(sender, rid, *receivers, method="work", flags=0):
    flat = tuple(n for position, r in enumerate(receivers) for n in (r.rank, r.incarnation, position))
    return Envelope(wire.CALL, rid, sender, 2, flat, len(receivers), method, flags=flags)


def answer(sender, rid, receiver, kind=wire.REPLY):
    return call(sender, rid, receiver).answer(kind, receiver)


class HopMachine(RuleBasedStateMachine):
    """Against a plain set of pairs."""

    def __init__(self):
        super().__init__()
        self.hop = InFlight()
        self.model = {}
        self.rid = 0

    @rule(sender=st.sampled_from(SENDERS), chosen=st.sets(st.sampled_from(RECEIVERS), min_size=1))
    def pass_on(self, sender, chosen):
        self.rid += 1
        receivers = sorted(chosen)
        for receiver in receivers:
            self.hop.passed(call(sender, self.rid, *receivers), receiver, float(self.rid))
            self.model[(sender, self.rid, receiver)] = None

    @precondition(lambda self: self.model)
    @rule(data=st.data(), kind=st.sampled_from([wire.REPLY, wire.ERROR, wire.END, wire.STARTED]))
    def is_answered(self, data, kind):
        entry = data.draw(st.sampled_from(list(self.model)))
        sender, rid, receiver = entry
        self.hop.answered(answer(sender, rid, receiver, kind), 99.0)
        del self.model[entry]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), kind=st.sampled_from([wire.ITEM, wire.CREDIT, wire.CANCEL]))
    def something_else_passes(self, data, kind):
        sender, rid, receiver = data.draw(st.sampled_from(list(self.model)))
        self.hop.answered(answer(sender, rid, receiver, kind), 99.0)

    @rule(sender=st.sampled_from(SENDERS), receiver=st.sampled_from(RECEIVERS))
    def an_answer_to_nothing_passes(self, sender, receiver):
        self.hop.answered(answer(sender, self.rid + 1, receiver), 99.0)
        self.hop.answered(answer(sender, self.rid, receiver._replace(incarnation=999)), 99.0)

    @rule(receiver=st.sampled_from(RECEIVERS))
    def receiver_dies(self, receiver):
        expected = [entry for entry in self.model if entry[2] == receiver]
        assert [p.key for p in self.hop.receiver_died(receiver)] == [RequestKey(s, rid) for s, rid, _ in expected]
        for entry in expected:
            del self.model[entry]

    @rule(senders=st.sets(st.sampled_from(SENDERS)))
    def senders_die(self, senders):
        expected = [entry for entry in self.model if entry[0] in senders]
        orphans = [(p.key.source, p.key.rid, p.receiver) for p in self.hop.senders_died(senders)]
        assert sorted(orphans) == sorted(expected)
        for entry in expected:
            del self.model[entry]

    @invariant()
    def lists_agree(self):
        assert len(self.hop) == len(self.model)
        for receiver in RECEIVERS:
            pending = [(p.key.source, p.key.rid) for p in self.hop.pending_at(receiver)]
            assert pending == [entry[:2] for entry in self.model if entry[2] == receiver]


TestHop = HopMachine.TestCase
TestHop.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_only_calls_are_remembered():
    hop = InFlight()
    cancel = call(SENDERS[0], 1, RECEIVERS[0])
    cancel.kind = wire.CANCEL
    hop.passed(cancel, RECEIVERS[0], 0.0)
    assert len(hop) == 0
    assert not expects_answer(cancel)
    assert expects_answer(call(SENDERS[0], 1, RECEIVERS[0]))


def test_one_way_is_read_from_the_flags():
    assert is_one_way(call(SENDERS[0], 1, RECEIVERS[0], flags=wire.ONE_WAY | wire.STREAM))
    assert not is_one_way(call(SENDERS[0], 1, RECEIVERS[0], flags=wire.STREAM))


def test_a_request_is_overdue_by_the_measure_of_its_own_method():
    hop = InFlight()
    sender, receiver = SENDERS[0], RECEIVERS[0]
    for rid, method, took in ((1, "slow", 100.0), (2, "fast", 1.0)):
        hop.passed(call(sender, rid, receiver, method=method), receiver, 0.0)
        hop.answered(answer(sender, rid, receiver), took)
    for rid, method in ((3, "slow"), (4, "fast"), (5, "new")):
        hop.passed(call(sender, rid, receiver, method=method), receiver, 200.0)
    assert hop.overdue(210.0, at_least_s=10.0, factor=5.0) == []
    assert [p.method for p in hop.overdue(211.0, at_least_s=10.0, factor=5.0)] == ["fast", "new"]
    assert [p.method for p in hop.overdue(701.0, at_least_s=10.0, factor=5.0)] == ["slow", "fast", "new"]


def test_of_many_methods_those_that_took_longest_are_remembered():
    hop = InFlight()
    sender, receiver = SENDERS[0], RECEIVERS[0]
    for number in range(MAX_METHODS + 50):
        request = call(sender, number, receiver, method=f"m{number}")
        hop.passed(request, receiver, 0.0)
        hop.answered(request.answer(wire.REPLY, receiver), 1000.0 if number == 0 else 10.0 + number)
    assert len(hop._longest) == MAX_METHODS
    for number in (0, 1):
        hop.passed(call(sender, number, receiver, method=f"m{number}"), receiver, 0.0)
    assert [late.method for late in hop.overdue(500.0, at_least_s=100.0, factor=1.0)] == ["m1"]
