"""The caller's list: every call ends exactly once, and nothing but an answer of one who was asked counts."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.rpc.calls import MAX_CHOSEN, CallTable, OpenCall
from miles_agents.wire.envelope import Address, Target

RANKS = 4
MESHES = (2, 3)


def target(rank, position=None):
    return Target(rank, 50 + rank, rank if position is None else position)


class Recorder:
    """A sink that remembers what it was told."""

    def __init__(self, fail_fast=True):
        self.fail_fast = fail_fast
        self.told = []
        self.settled = 0

    def on_value(self, position, value):
        self.told.append(("value", position, value))

    def on_error(self, position, error):
        self.told.append(("error", position, error))

    def on_item(self, position, item):
        self.told.append(("item", position, item))

    def on_end(self, position):
        self.told.append(("end", position, None))

    def on_settled(self):
        self.settled += 1


def opened(table, rid, ranks, mesh=2, fail_fast=True):
    sink = Recorder(fail_fast)
    table.open(OpenCall(rid, mesh, "work", {rank: target(rank) for rank in ranks}, sink, 0.0, 1))
    return sink


class TableMachine(RuleBasedStateMachine):
    """Against a dict of what each open call is still owed."""

    def __init__(self):
        super().__init__()
        self.table = CallTable()
        self.sinks = {}
        self.owing = {}  # rid -> ranks, of open calls
        self.mesh = {}
        self.cancelling = set()
        self.rid = 0

    @rule(ranks=st.sets(st.integers(0, RANKS - 1), min_size=1), mesh=st.sampled_from(MESHES), fail_fast=st.booleans())
    def opens(self, ranks, mesh, fail_fast):
        self.rid += 1
        self.sinks[self.rid] = opened(self.table, self.rid, sorted(ranks), mesh, fail_fast)
        self.owing[self.rid] = set(ranks)
        self.mesh[self.rid] = mesh

    def pick(self, data):
        rid = data.draw(st.sampled_from(list(self.owing)))
        return rid, data.draw(st.sampled_from(sorted(self.owing[rid])))

    def of(self, rid, rank):
        return Address(self.mesh[rid], rank, 50 + rank)

    @precondition(lambda self: self.owing)
    @rule(data=st.data(), ends=st.booleans())
    def answers(self, data, ends):
        rid, rank = self.pick(data)
        answer = self.table.end(rid, self.of(rid, rank)) if ends else self.table.value(rid, self.of(rid, rank), "v")
        assert self.sinks[rid].told[-1] == (("end", rank, None) if ends else ("value", rank, "v"))
        self.owing[rid].discard(rank)
        self.ended_if(rid, answer, not self.owing[rid])

    @precondition(lambda self: self.owing)
    @rule(data=st.data())
    def yields(self, data):
        rid, rank = self.pick(data)
        assert self.table.item(rid, self.of(rid, rank), "i")
        assert self.sinks[rid].told[-1] == ("item", rank, "i")

    @precondition(lambda self: self.owing)
    @rule(data=st.data())
    def fails_there(self, data):
        rid, rank = self.pick(data)
        error = ValueError()
        call, stop = self.table.error(rid, self.of(rid, rank), error)
        assert self.sinks[rid].told[-1] == ("error", rank, error)
        self.owing[rid].discard(rank)
        fast = self.sinks[rid].fail_fast
        assert {t.rank for t in stop} == (self.owing[rid] if fast and rid not in self.cancelling else set())
        self.ended_if(rid, call, fast or not self.owing[rid])

    @precondition(lambda self: self.owing)
    @rule(data=st.data())
    def fails_here(self, data):
        rid, _ = self.pick(data)
        before = len(self.sinks[rid].told)
        call, stop = self.table.fail(rid, TimeoutError())
        told = self.sinks[rid].told[before:]
        assert {kind for kind, _, _ in told} == {"error"}
        assert len(told) == (1 if self.sinks[rid].fail_fast else len(self.owing[rid]))
        assert {t.rank for t in stop} == (set() if rid in self.cancelling else self.owing[rid])
        self.ended_if(rid, call, True)

    @precondition(lambda self: self.owing)
    @rule(data=st.data())
    def is_cancelled(self, data):
        rid, _ = self.pick(data)
        told = {t.rank for t in self.table.cancel(rid)}
        assert told == (set() if rid in self.cancelling else self.owing[rid])
        self.cancelling.add(rid)

    @rule(data=st.data(), rank=st.integers(0, RANKS - 1), other_mesh=st.booleans())
    def strangers_and_latecomers_speak(self, data, rank, other_mesh):
        rid = data.draw(st.integers(0, self.rid + 1))
        asked = rank in self.owing.get(rid, ())
        mesh = self.mesh.get(rid, MESHES[0]) + (1 if other_mesh else 0)
        stranger = Address(mesh, rank, 49 if asked and not other_mesh else 50 + rank)
        late = self.table.stats.late
        told = {known: list(sink.told) for known, sink in self.sinks.items()}
        assert self.table.value(rid, stranger, "x") is None
        assert self.table.end(rid, stranger) is None
        assert not self.table.item(rid, stranger, "x")
        assert self.table.error(rid, stranger, ValueError()) == (None, [])
        assert self.table.stats.late == late + 4
        assert told == {known: sink.told for known, sink in self.sinks.items()}
        if rid not in self.owing:
            assert self.table.fail(rid, ValueError()) == (None, [])
            assert self.table.cancel(rid) == []

    @rule(mesh=st.sampled_from(MESHES), ranks=st.sets(st.integers(0, RANKS - 1), min_size=1))
    def chooses(self, mesh, ranks):
        owed = Counter(rank for rid, owing in self.owing.items() if self.mesh[rid] == mesh for rank in owing)
        chosen = self.table.least_owing(mesh, [target(rank) for rank in sorted(ranks)])
        assert chosen.rank in ranks
        assert owed[chosen.rank] == min(owed[rank] for rank in ranks)

    def ended_if(self, rid, call, over):
        assert (call is not None) == over
        if over:
            assert call.rid == rid
            del self.owing[rid]

    @invariant()
    def every_call_ends_exactly_once(self):
        assert {call.rid for call in self.table} == set(self.owing)
        for rid, sink in self.sinks.items():
            assert sink.settled == (0 if rid in self.owing else 1)
            last = [position for kind, position, _ in sink.told if kind != "item"]
            assert len(last) == len(set(last)), "two ends of one receiver"
        assert self.table.stats.settled + len(self.table) == self.table.stats.opened


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_answers_reach_the_sink_by_position_in_the_mesh_that_was_called():
    table, sink = CallTable(), Recorder()
    table.open(OpenCall(1, 2, "work", {6: target(6, position=0), 2: target(2, position=1)}, sink, 0.0, 1))
    table.value(1, Address(2, 2, 52), "b")
    assert table.value(1, Address(2, 6, 56), "a").rid == 1
    assert sink.told == [("value", 1, "b"), ("value", 0, "a")]


def test_equals_are_chosen_in_turn_whatever_else_is_called_meanwhile():
    table = CallTable()
    ranks = [target(rank) for rank in range(3)]
    chosen = []
    for turn in range(9):
        rank = table.least_owing(2, ranks).rank
        chosen.append(rank)
        for offset in range(3):  # as many other calls as there are ranks
            opened(table, 10 * turn + offset, [rank], mesh=3)
        opened(table, 10 * turn + 9, [rank])
        table.value(10 * turn + 9, Address(2, rank, 50 + rank), None)
    assert chosen == [0, 1, 2] * 3


def test_choosing_looks_at_the_ranks_and_not_at_the_open_calls():
    class Forgetful(CallTable):
        def __iter__(self):
            raise AssertionError("looked at every call")

    table = Forgetful()
    table._open = type("Calls", (dict,), {"values": Forgetful.__iter__, "items": Forgetful.__iter__})()
    opened(table, 1, [0, 1])
    opened(table, 2, [0])
    assert table.least_owing(2, [target(0), target(1)]).rank == 1


def test_nothing_is_kept_of_calls_that_are_over():
    table = CallTable()
    for rid in range(50):
        opened(table, rid, range(RANKS))
        table.fail(rid, ValueError())
    assert len(table) == 0
    assert table._owed == {}


def test_of_many_ranks_only_the_latest_choices_are_remembered():
    table = CallTable()
    for mesh in range(MAX_CHOSEN + 10):
        table.least_owing(mesh, [target(0)])
        table.least_owing(0, [target(0)])  # chosen all the time, so never forgotten
    assert len(table._chosen) == MAX_CHOSEN
    assert table.least_owing(0, [target(0), target(1)]).rank == 1
