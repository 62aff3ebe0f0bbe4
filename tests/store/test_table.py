"""The pool's table: room in order, no more than there is, nothing lost, nothing given twice."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.store.layout import PAGE
from miles_agents.store.ref import Key
from miles_agents.store.table import MOST_OVERTAKING, Close, Grant, Make, Owner, PoolTable, Refuse, capacity_for
from miles_agents.store.table_view import status_of, store_full

KB64 = 64 * 1024
A, B, C = Owner("a", "put[0]"), Owner("b", "put[1]"), Owner("c", "read[0]")


def key(number):
    return Key(1, 2, number)


def filled(table, request, owner, nbytes, numbers=(1,), now=0.0):
    """Room asked for, made if need be, committed as one object per number."""
    effects = table.ask(request, owner, nbytes, now + 60, now)
    if isinstance(effects[0], Make):
        effects = table.made(effects[0].segment, now)
    (grant,) = effects
    table.commit(grant.segment, request, [(key(n), i * PAGE, PAGE) for i, n in enumerate(numbers)], now)
    return grant.segment


def test_a_segment_is_made_once_and_used_again():
    table = PoolTable(10 * KB64, 10)
    segment = filled(table, 1, A, 1000)
    assert table.remove(key(1), 1.0) == []
    assert filled(table, 2, B, 1000, (2,)) == segment
    assert table.total_bytes == KB64


def test_the_best_of_the_free_segments_is_taken_and_none_that_is_far_too_large():
    table = PoolTable(100 * KB64, 10)
    sizes = {filled(table, n, A, n * KB64, (n,)): n for n in (1, 4, 8, 20)}
    for n in (1, 4, 8, 20):
        table.remove(key(n), 1.0)
    assert sizes[filled(table, 10, A, 3 * KB64, (10,))] == 4
    assert isinstance(table.ask(11, A, 9 * KB64, 60, 2.0)[0], Make)


def test_a_removed_object_that_is_mapped_keeps_its_segment_until_the_release():
    table = PoolTable(2 * KB64, 10)
    filled(table, 1, A, 2 * KB64)
    assert table.hold(key(1), 7, C) is not None
    assert table.remove(key(1), 1.0) == []
    assert table.find(key(1)) is None and table.hold(key(1), 8, C) is None
    assert table.ask(2, B, KB64, 60, 2.0) == []
    effects = table.release("c", [7], 3.0)
    assert effects[0] in (Grant(2, 1, 2 * KB64), Close(1))


def test_parts_share_a_segment_until_the_last_of_them_is_removed():
    table = PoolTable(KB64, 10)
    segment = filled(table, 1, A, 3 * PAGE, (1, 2, 3))
    table.remove(key(1), 1.0)
    table.remove(key(3), 1.0)
    assert table.segments[segment].state == "committed" and table.find(key(2)) is not None
    table.remove(key(2), 1.0)
    assert table.segments[segment].state == "free" and not table.objects


def test_idle_segments_are_closed_for_one_that_none_of_them_fits():
    table = PoolTable(4 * KB64, 10)
    for n in (1, 2, 3):
        filled(table, n, A, KB64, (n,), now=n)
    table.remove(key(1), 11.0)
    table.remove(key(2), 12.0)
    effects = table.ask(9, B, 3 * KB64, 60, 13.0)
    assert effects == [Close(1), Close(2)]
    assert table.closed(1, 14.0) == []
    (make,) = table.closed(2, 15.0)
    assert make == Make(4, 3 * KB64)
    assert table.made(4, 16.0) == [Grant(9, 4, 3 * KB64)]


def test_who_waits_is_served_in_order_and_refused_at_the_deadline():
    table = PoolTable(KB64, 10)
    filled(table, 1, A, KB64)
    assert table.ask(2, B, KB64, 5.0, 1.0) == []
    assert table.ask(3, C, KB64, 60.0, 1.0) == []
    assert table.next_deadline == 5.0
    assert table.tick(5.0) == [Refuse(2, "", 4.0, 1)]
    assert table.remove(key(1), 6.0) == [Grant(3, 1, KB64)]


def test_a_death_ends_what_was_not_committed_and_nothing_else():
    table = PoolTable(3 * KB64, 10)
    filled(table, 1, A, KB64)
    (make,) = table.ask(2, A, KB64, 60, 0.0)
    table.made(make.segment, 0.0)
    table.hold(key(1), 1, A)
    table.ask(3, A, KB64, 60, 0.0)
    table.ask(4, A, KB64, 60, 0.0)
    assert table.num_waiting == 1
    table.owner_gone("a", 1.0)
    assert table.find(key(1)) is not None and table.num_holds == 0 and table.num_waiting == 0
    assert [s.state for s in table.segments.values()] == ["committed", "free", "making"]
    assert table.made(3, 2.0) == [] and table.segments[3].state == "free"


def test_no_memory_is_told_to_who_asked_and_the_next_is_served():
    table = PoolTable(2 * KB64, 10)
    (make,) = table.ask(1, A, 2 * KB64, 60, 0.0)
    assert table.ask(2, B, KB64, 60, 0.0) == []
    refused, other = table.make_failed(make.segment, "OSError: no", 1.0)
    assert refused == Refuse(1, "OSError: no", 1.0, 1) and isinstance(other, Make)


def test_at_most_so_many_pass_the_same_request():
    table = PoolTable(200 * KB64, 1000)
    filled(table, 1, A, 100 * KB64)
    assert table.ask(2, B, 150 * KB64, 60, 1.0) == []
    served = [bool(table.ask(request, C, 100, 60, 2.0)) for request in range(3, 3 + MOST_OVERTAKING + 5)]
    assert served == [True] * MOST_OVERTAKING + [False] * 5


def test_what_goes_first_is_served_before_those_who_waited_longer():
    table = PoolTable(2 * KB64, 10)
    filled(table, 1, A, 2 * KB64)
    assert table.ask(2, B, 2 * KB64, 60, 1.0) == []
    assert table.ask(3, C, 2 * KB64, 60, 2.0, goes_first=True) == []
    assert table.remove(key(1), 3.0) == [Grant(3, 1, 2 * KB64)]
    assert table.num_waiting == 1


def test_the_deadline_counts_while_the_segment_is_made_and_the_segment_is_the_next_ones():
    table = PoolTable(2 * KB64, 10)
    (make,) = table.ask(1, A, 2 * KB64, 5.0, 0.0)
    assert table.next_deadline == 5.0 and table.tick(4.9) == []
    (refuse,) = table.tick(5.0)
    assert refuse == Refuse(1, "", 5.0, 0) and table.next_deadline is None
    assert "128.0 KiB being made by the system for 5 s" in store_full(table, refuse, 2 * KB64, "n0", 5.0).evidence
    assert table.made(make.segment, 6.0) == []
    assert table.ask(2, B, 2 * KB64, 60, 7.0) == [Grant(2, make.segment, 2 * KB64)]


def test_who_runs_out_of_segments_is_told_so():
    table = PoolTable(100 * KB64, 2)
    for n in (1, 2):
        filled(table, n, A, 100, (n,))
    assert table.ask(3, B, 100, 5.0, 0.0) == []
    (refuse,) = table.tick(5.0)
    error = store_full(table, refuse, 100, "n0", 5.0)
    assert "2 of 2 segments" in error.evidence and "put_parts" in error.advice
    assert (status_of(table, 5.0)["num_segments"], status_of(table, 5.0)["max_segments"]) == (2, 2)


class CountedParts(list):
    """Counts how many of the parts are looked at."""

    looks = 0

    def __iter__(self):
        for part in super().__iter__():
            CountedParts.looks += 1
            yield part


def test_the_removal_and_release_of_a_part_does_not_look_at_the_others():
    table = PoolTable(100 * KB64, 10)
    numbers = tuple(range(1, 101))
    segment = filled(table, 1, A, 100 * PAGE, numbers)
    table.segments[segment].objects = CountedParts(table.segments[segment].objects)
    for number in numbers:
        table.hold(key(number), number, C)
        table.remove(key(number), 1.0)
    table.release("c", numbers, 2.0)
    assert table.segments[segment].state == "free" and not table.objects
    assert CountedParts.looks == len(numbers)


def test_capacities_leave_little_unused():
    for nbytes in (1, PAGE, KB64, 10 * KB64 + 1, 1 << 26, (1 << 26) + 1, 12345678901):
        capacity = capacity_for(nbytes)
        assert nbytes <= capacity and capacity % PAGE == 0
        assert capacity <= max(nbytes + KB64, nbytes * 1.07)


LIMIT, MOST = 12 * KB64, 8


class Pool(RuleBasedStateMachine):
    """Any order of questions, outcomes and deaths."""

    def __init__(self):
        super().__init__()
        self.table = PoolTable(LIMIT, MOST)
        self.now = 0.0
        self.open = {}  # request: (owner, deadline), not yet ended
        self.order = []  # requests that wait, as they came
        self.sizes, self.first, self.passed = {}, set(), {}
        self.granted = {}  # segment: (request, owner)
        self.making, self.closing = set(), set()
        self.stored = {}  # key: (owner, segment)
        self.mapped = {}  # hold: (owner, key, segment)
        self.numbers = 0

    def take(self, effects):
        for effect in effects:
            if isinstance(effect, Make):
                self.making.add(effect.segment)
                self.served(self.table.segments[effect.segment].request)
            elif isinstance(effect, Close):
                self.closing.add(effect.segment)
                assert effect.segment not in self.granted
            elif isinstance(effect, Grant):
                owner, _ = self.open.pop(effect.request)
                if effect.request in self.order:
                    self.served(effect.request)
                assert effect.segment not in self.granted and effect.segment not in self.making
                assert all(segment != effect.segment for _, segment in self.stored.values())
                assert all(segment != effect.segment for _, _, segment in self.mapped.values()), "still mapped"
                self.granted[effect.segment] = (effect.request, owner)
            else:
                self.open.pop(effect.request)
                if effect.request in self.order:
                    self.order.remove(effect.request)

    def served(self, request):
        place = self.order.index(request)
        assert request in self.first or not any(
            other in self.first and self.sizes[other] <= self.sizes[request] for other in self.order
        ), "before one that goes first"
        for other in self.order[:place]:
            if request in self.first and other not in self.first:
                continue
            assert self.sizes[request] < self.sizes[other], "passed by one that is not smaller"
            self.passed[other] = self.passed.get(other, 0) + 1
            assert self.passed[other] <= MOST_OVERTAKING
        self.order.remove(request)

    def next_number(self):
        self.numbers += 1
        return self.numbers

    @rule(
        owner=st.sampled_from([A, B, C]),
        nbytes=st.integers(1, LIMIT),
        patience=st.integers(1, 20),
        first=st.booleans(),
    )
    def ask(self, owner, nbytes, patience, first):
        request = self.next_number()
        self.open[request] = (owner, self.now + patience)
        self.order.append(request)
        self.sizes[request] = nbytes
        self.first |= {request} if first else set()
        self.take(self.table.ask(request, owner, nbytes, self.now + patience, self.now, goes_first=first))

    @precondition(lambda self: self.making)
    @rule(data=st.data(), works=st.booleans())
    def outcome(self, data, works):
        segment = data.draw(st.sampled_from(sorted(self.making)))
        self.making.discard(segment)
        call = self.table.made(segment, self.now) if works else self.table.make_failed(segment, "no", self.now)
        self.take(call)

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def closed(self, data):
        segment = data.draw(st.sampled_from(sorted(self.closing)))
        self.closing.discard(segment)
        self.take(self.table.closed(segment, self.now))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), parts=st.integers(1, 3))
    def commit(self, data, parts):
        segment = data.draw(st.sampled_from(sorted(self.granted)))
        request, owner = self.granted.pop(segment)
        keys = [key(self.next_number()) for _ in range(parts)]
        self.table.commit(segment, request, [(k, i * PAGE, PAGE) for i, k in enumerate(keys)], self.now)
        self.stored.update(dict.fromkeys(keys, (owner, segment)))

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def give_up_a_grant(self, data):
        segment = data.draw(st.sampled_from(sorted(self.granted)))
        request, _ = self.granted.pop(segment)
        self.take(self.table.give_up(request, self.now))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def give_up_waiting(self, data):
        request = data.draw(st.sampled_from(sorted(self.open)))
        del self.open[request]
        if request in self.order:
            self.order.remove(request)
        self.take(self.table.give_up(request, self.now))

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), owner=st.sampled_from([A, B, C]))
    def hold(self, data, owner):
        found = data.draw(st.sampled_from(sorted(self.stored)))
        hold = self.next_number()
        assert self.table.hold(found, hold, owner).key == found, "a committed object is gone"
        self.mapped[hold] = (owner, found, self.stored[found][1])

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def release(self, data):
        hold = data.draw(st.sampled_from(sorted(self.mapped)))
        owner, _, _ = self.mapped.pop(hold)
        self.take(self.table.release(owner.ident, [hold, 999_999], self.now))

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def remove(self, data):
        found = data.draw(st.sampled_from(sorted(self.stored)))
        del self.stored[found]
        self.take(self.table.remove(found, self.now))
        self.take(self.table.remove(found, self.now))

    @rule(owner=st.sampled_from([A, B, C]))
    def dies(self, owner):
        for request in [request for request, (asker, _) in self.open.items() if asker == owner]:
            del self.open[request]
            if request in self.order:
                self.order.remove(request)
        self.granted = {s: g for s, g in self.granted.items() if g[1] != owner}
        self.mapped = {h: m for h, m in self.mapped.items() if m[0] != owner}
        self.take(self.table.owner_gone(owner.ident, self.now))

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds):
        self.now += seconds
        late = [r for r, (_, deadline) in self.open.items() if deadline <= self.now]
        effects = self.table.tick(self.now)
        assert {e.request for e in effects if isinstance(e, Refuse)} == set(late)
        self.take(effects)

    @invariant()
    def never_more_than_there_is(self):
        assert self.table.total_bytes <= LIMIT and len(self.table.segments) <= MOST

    @invariant()
    def what_was_committed_is_there(self):
        assert {k for k, o in self.table.objects.items() if not o.removed} == set(self.stored)
        assert self.table.num_holds == len(self.mapped)
        assert self.table.num_waiting == len(self.order)

    @invariant()
    def the_totals_are_right(self):
        segments = self.table.segments.values()
        assert self.table.total_bytes == sum(s.capacity for s in segments)
        assert self.table.used_bytes == sum(s.capacity for s in segments if s.state != "free")
        assert self.table.num_used == sum(s.state != "free" for s in segments)

    @invariant()
    def nobody_waits_for_nothing(self):
        idle = not self.granted and not self.making and not self.closing and not self.stored and not self.mapped
        assert not (idle and self.order), "room, and somebody who waits for it"


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
