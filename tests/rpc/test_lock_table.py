"""The lock table: one holder, first come first served, growing tokens, and nothing for the dead."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles_agents.rpc.lock_table import (
    MAX_GRAVES,
    Acquire,
    Cancel,
    DeadLockHolder,
    Expired,
    Grant,
    Holder,
    HolderDied,
    LockTable,
    Refuse,
    Release,
    Released,
    StaleLockToken,
    Tick,
    Waiter,
    refusal_error,
    step,
)

A, B, C = (Waiter(Holder(3, rank, 10 + rank), 1) for rank in range(3))


def run(*events, table=None, now=0.0):
    table, effects = table or LockTable(), []
    for event in events:
        table, more = step(table, event, now)
        effects += more
    return table, effects


def test_a_free_lock_is_granted_and_passed_on_in_order():
    table, effects = run(Acquire("w", A), Acquire("w", B), Acquire("w", C))
    assert effects == [Grant("w", A, 1)]
    table, effects = run(Release("w", Waiter(A.holder, 9), 1), table=table)
    assert effects == [Released("w", Waiter(A.holder, 9)), Grant("w", B, 2)]
    _, effects = run(Cancel(B), table=table)
    assert effects == [Grant("w", C, 3)]


def test_tokens_grow_over_all_locks():
    _, effects = run(Acquire("x", A), Acquire("y", A), Acquire("z", B))
    assert [effect.token for effect in effects] == [1, 2, 3]


def test_requests_of_one_holder_wait_for_each_other_and_go_with_its_death():
    second, third = Waiter(A.holder, 2), Waiter(A.holder, 3)
    table, effects = run(Acquire("w", A), Acquire("w", second), Acquire("w", third), Acquire("w", B))
    assert effects == [Grant("w", A, 1)]
    table, effects = run(Release("w", Waiter(A.holder, 9), 1), table=table)
    assert effects[1:] == [Grant("w", second, 2)]
    _, effects = run(HolderDied(A.holder), table=table)
    assert effects == [Grant("w", B, 3)]


def test_a_bounded_number_of_the_dead_is_remembered_the_latest_of_them():
    holders = [Holder(mesh, 0, 5) for mesh in range(MAX_GRAVES + 2)]
    table, _ = run(*(HolderDied(holder) for holder in [holders[0], *holders[1:3], holders[0], *holders[3:]]))
    assert len(table.graves) == MAX_GRAVES
    refused = [table.graves.find(holder) is not None for holder in holders]
    assert [mesh for mesh, was in enumerate(refused) if not was] == [1, 2]
    assert table.graves.find(Holder(0, 0, 4)) == 5
    assert table.graves.find(Holder(0, 0, 6)) is None


def test_a_stale_token_and_a_foreign_release_are_refused():
    table, _ = run(Acquire("w", A))
    for by, token in ((A, 7), (B, 1)):
        same, effects = run(Release("w", by, token), table=table)
        assert same == table
        assert isinstance(refusal_error(effects[0]), StaleLockToken)
    _, effects = run(Release("w", A, 1), Release("w", A, 1), table=table)
    assert [type(effect) for effect in effects] == [Released, Refuse]


def test_a_hold_that_lasts_too_long_expires_and_its_token_is_stale():
    table, _ = run(Acquire("w", A, hold_s=5.0), Acquire("w", B, hold_s=5.0), now=1.0)
    assert table.next_expiry() == 6.0
    assert run(Tick(), table=table, now=5.9)[1] == []
    table, effects = run(Tick(), table=table, now=6.0)
    assert effects == [Expired("w", A, 1), Grant("w", B, 2)]
    assert table.next_expiry() == 11.0
    assert run(Release("w", A, 1), table=table, now=6.0)[1][0].reason == "stale_token"


def test_the_dead_lose_everything_and_get_nothing_any_more():
    table, _ = run(Acquire("w", A), Acquire("w", B), Acquire("v", B), Acquire("v", A))
    table, effects = run(HolderDied(A.holder), table=table)
    assert effects == [Grant("w", B, 3)]
    _, effects = run(Acquire("w", A), table=table)
    assert isinstance(refusal_error(effects[0]), DeadLockHolder)
    successor = Waiter(Holder(3, 0, 99), 1)
    assert run(Acquire("new", successor), table=table)[1] == [Grant("new", successor, 4)]


@pytest.mark.parametrize("waiting", [False, True])
def test_a_cancel_frees_also_what_was_just_granted(waiting):
    table, _ = run(Acquire("w", A), *([Acquire("w", B)] if waiting else []))
    table, effects = run(Cancel(A), table=table)
    assert effects == ([Grant("w", B, 2)] if waiting else [])
    assert bool(table.locks) == waiting


class Locks(RuleBasedStateMachine):
    """Plays random events against the table and against a plain list of queues."""

    @initialize()
    def start(self):
        self.table, self.now, self.request, self.token = LockTable(), 0.0, 0, 0
        self.queues = {}  # name -> [(waiter, hold_s)], the holder first
        self.held_since = {}
        self.incarnations = dict.fromkeys(range(3), 1)
        self.tokens = {}
        self.expected = []

    def play(self, event):
        self.table, effects = step(self.table, event, self.now)
        for effect in effects:
            if isinstance(effect, Grant):
                assert effect.token > self.token
                self.token = self.tokens[effect.waiter] = effect.token
        granted = [(effect.name, effect.waiter) for effect in effects if isinstance(effect, Grant)]
        assert sorted(granted, key=repr) == sorted(self.expected, key=repr)
        self.expected = []
        return effects

    def promote(self, name):
        """The first in the queue has just become the holder."""
        if self.queues[name]:
            self.held_since[name] = self.now
            self.expected.append((name, self.queues[name][0][0]))
        else:
            del self.queues[name]

    def holder(self, rank):
        return Holder(1, rank, self.incarnations[rank])

    @rule(name=st.sampled_from("xy"), rank=st.integers(0, 2), hold_s=st.none() | st.integers(1, 5))
    def acquire(self, name, rank, hold_s):
        self.request += 1
        waiter, queue = Waiter(self.holder(rank), self.request), self.queues.setdefault(name, [])
        queue.append((waiter, hold_s))
        if len(queue) == 1:
            self.promote(name)
        self.play(Acquire(name, waiter, hold_s))

    @rule(name=st.sampled_from("xy"), rank=st.integers(0, 2), stale=st.booleans())
    def release(self, name, rank, stale):
        self.request += 1
        by, queue = Waiter(self.holder(rank), self.request), self.queues.get(name, [])
        holds = bool(queue) and queue[0][0].holder == by.holder and not stale
        token = self.tokens[queue[0][0]] if holds else self.token + 1
        if holds:
            queue.pop(0)
            self.promote(name)
        assert isinstance(self.play(Release(name, by, token))[0], Released if holds else Refuse)

    @precondition(lambda self: self.queues)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.queues)))
        place = data.draw(st.integers(0, len(self.queues[name]) - 1))
        waiter, _ = self.queues[name].pop(place)
        if place == 0:
            self.promote(name)
        self.play(Cancel(waiter))

    @rule(rank=st.integers(0, 2))
    def die(self, rank):
        dead = self.holder(rank)
        self.incarnations[rank] += 1
        for name in list(self.queues):
            held = self.queues[name][0][0].holder == dead
            self.queues[name] = [one for one in self.queues[name] if one[0].holder != dead]
            if held:
                self.promote(name)
        self.play(HolderDied(dead))
        late = Waiter(dead, 0)
        assert [effect.reason for effect in self.play(Acquire("x", late))] == ["dead"]

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds):
        self.now += seconds
        expired = []
        for name in list(self.queues):
            waiter, hold_s = self.queues[name][0]
            if hold_s is not None and self.held_since[name] + hold_s <= self.now:
                expired.append((name, waiter))
                self.queues[name].pop(0)
                self.promote(name)
        effects = self.play(Tick())
        seen = [(effect.name, effect.waiter) for effect in effects if isinstance(effect, Expired)]
        assert sorted(seen, key=repr) == sorted(expired, key=repr)

    @invariant()
    def table_matches_the_queues(self):
        seen = {
            name: [lock.held.waiter, *(event.waiter for event in lock.waiting)]
            for name, lock in self.table.locks.items()
        }
        assert seen == {name: [waiter for waiter, _ in queue] for name, queue in self.queues.items()}


TestLocks = Locks.TestCase
TestLocks.settings = settings(max_examples=50)
