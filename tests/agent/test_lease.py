"""The lease: renewed by answers, counted from sending, fenced once, and never overlapping with a successor."""

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_agents.agent import lease as leases
from miles_agents.agent.lease import (
    BeatAnswered,
    BeatSent,
    Fence,
    Goodbye,
    InvalidLease,
    Lease,
    LinkDown,
    LinkUp,
    Recovered,
    StdinClosed,
    Suspect,
    Tick,
)
from miles_agents.node_info import NodeInfo
from miles_agents.timings import Timings
from miles_controller import membership as members
from miles_controller.membership import Membership, NodeDead

INFO = NodeInfo("n0", "host", ("10.0.0.1",), (), 8, 4, 1 << 30, "3.12.3", "Linux")


def start(**changes):
    return Lease.start(0.0, **{"fence_s": 15.0, "suspect_s": 5.0, **changes})


def run(lease, *timed):
    """A copy of the lease after these events, and what came of them."""
    lease, effects = copy.deepcopy(lease), []
    for now, event in timed:
        effects += leases.step(lease, event, now)
    return lease, effects


def test_an_answer_renews_from_the_time_of_sending():
    lease, effects = run(start(), (3.0, BeatSent(1)), (4.9, BeatAnswered(1)))
    assert (effects, lease.ends_at, lease.next_tick) == ([], 18.0, 8.0)
    assert run(lease, (8.0, Tick()), (17.9, Tick()))[1] == [Suspect(5.0)]
    assert isinstance(run(lease, (18.0, Tick()))[1][-1], Fence)


def test_an_answer_to_an_older_or_unknown_beat_renews_nothing():
    lease, _ = run(start(), (1.0, BeatSent(1)), (2.0, BeatSent(2)), (3.0, BeatAnswered(2)), (4.0, BeatAnswered(1)))
    assert (lease.ends_at, dict(lease.sent)) == (17.0, {})
    assert run(lease, (4.5, BeatAnswered(77)))[0].ends_at == 17.0


def test_silence_is_suspected_and_recovered_in_turn():
    lease, effects = run(start(), (4.0, BeatSent(1)), (5.0, Tick()), (6.0, Tick()), (7.0, BeatAnswered(1)))
    assert effects == [Suspect(5.0), Recovered()]
    assert run(lease, (9.0, Tick()))[1] == [Suspect(5.0)]


def test_an_answer_that_is_read_after_the_end_is_too_late():
    lease, effects = run(start(), (14.0, BeatSent(1)), (15.0, BeatAnswered(1)))
    assert [type(effect) for effect in effects] == [Suspect, Fence]
    assert run(lease, (16.0, Tick()), (17.0, Goodbye()), (18.0, LinkDown()))[1] == []


def test_a_suspended_agent_fences_when_it_wakes():
    assert isinstance(run(start(), (1.0, Tick()), (300.0, Tick()))[1][0], Fence)


def test_a_suspended_worker_does_not_count_the_time_it_slept():
    lease, effects = run(start(kind="observed"), (1.0, BeatSent(1)), (300.0, Tick()))
    assert effects == []
    assert lease.skipped_s == 297.0
    lease, effects = run(lease, (300.1, BeatAnswered(1)))
    assert (effects, lease.ends_at) == ([], 313.0)


def test_a_worker_that_runs_counts_every_second():
    lease, effects, now = start(kind="observed"), [], 0.0
    while not lease.fenced:
        now = lease.next_tick
        more = leases.step(lease, Tick(), now)
        effects += more
    assert ([type(effect) for effect in effects], now) == ([Suspect, Fence], 15.0)


@pytest.mark.parametrize("order", [(StdinClosed(), LinkDown()), (LinkDown(), StdinClosed())])
def test_the_end_of_stdin_and_of_the_link_fence_together_only(order):
    lease, effects = run(start(), (1.0, order[0]))
    assert effects == []
    _, effects = run(lease, (2.0, order[1]))
    assert len(effects) == 1
    assert not effects[0].orderly


def test_a_link_that_came_back_keeps_a_node_without_stdin():
    assert run(start(), (1.0, LinkDown()), (2.0, LinkUp()), (3.0, StdinClosed()), (4.0, Tick()))[1] == []


def test_a_goodbye_fences_in_good_order_at_once():
    (fence,) = run(start(), (1.0, Goodbye()))[1]
    assert fence.orderly


@pytest.mark.parametrize("bad", [{"suspect_s": 15.0}, {"suspect_s": 0.0}, {"suspend_gap_s": 0.0}])
def test_a_lease_with_contradicting_numbers_is_refused(bad):
    with pytest.raises(InvalidLease):
        start(**bad)


events = st.one_of(
    st.builds(BeatSent, st.integers(0, 5)),
    st.builds(BeatAnswered, st.integers(0, 5)),
    st.sampled_from([Tick(), StdinClosed(), LinkUp(), LinkDown(), Tick(), Tick()]),
)


@given(st.lists(st.tuples(st.floats(0, 4), events), max_size=60), st.sampled_from(["strict", "observed"]))
def test_effects_alternate_and_the_fence_is_the_last(steps, kind):
    lease, now, effects = start(kind=kind), 0.0, []
    for gap, event in steps:
        now += gap
        more = leases.step(lease, event, now)
        effects += more
    warnings = [type(effect) for effect in effects if not isinstance(effect, Fence)]
    assert warnings == [Suspect, Recovered] * (len(warnings) // 2) + [Suspect] * (len(warnings) % 2)
    fences = [place for place, effect in enumerate(effects) if isinstance(effect, Fence)]
    assert fences in ([], [len(effects) - 1])
    assert bool(fences) == (lease.fenced is not None)


@given(st.floats(0, 1e6), st.floats(0.01, 30), st.floats(1.01, 5), st.sampled_from(["strict", "observed"]))
def test_a_tick_at_the_published_time_always_gets_further(started, suspect_s, factor, kind):
    lease = Lease.start(
        started, fence_s=suspect_s * factor, suspect_s=suspect_s, kind=kind, suspend_gap_s=suspect_s / 3
    )
    for _ in range(100):
        now = lease.next_tick
        before = copy.deepcopy(lease)
        leases.step(lease, Tick(), now)
        if lease.fenced:
            return
        assert lease.next_tick > before.next_tick or lease.suspect != before.suspect
    raise AssertionError("the lease never ended")


class Line:
    """One direction of a line: loses, delays, reorders, and is cut for good at some time."""

    def __init__(self, dice, *, loss, cut_at):
        self.dice, self.loss, self.cut_at, self.under_way = dice, loss, cut_at, []

    def send(self, message, now):
        if now < self.cut_at and self.dice.random() >= self.loss:
            self.under_way.append((now + self.dice.randrange(80) / 8, message))

    def arrived(self, now):
        due = sorted((one for one in self.under_way if one[0] <= now), key=lambda one: one[0])
        self.under_way = [one for one in self.under_way if one[0] > now]
        return [message for _, message in due]


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    losses=st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.3, 0.9])),
    cuts=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_an_agent_fences_before_its_controller_gives_its_ranks_away(seed, losses, cuts):
    """Each direction fails by itself. Time in eighths of a second, exact in floats; steps of half a second at most."""
    timings, dice = Timings(), random.Random(seed)
    up, down = (Line(dice, loss=loss, cut_at=cut) for loss, cut in zip(losses, cuts, strict=True))
    lease = Lease.start(0.0, fence_s=timings.fence_s, suspect_s=timings.suspect_s)
    control = Membership(["n0"], timings)
    now = heard_at = dice.randrange(40) / 8
    control.step(members.Hello("n0", "s", INFO), now)
    fenced_at = dead_at = None
    beat = 0
    while dead_at is None:
        now += dice.choice([0.125, 0.25, 0.5])
        for message in up.arrived(now):
            heard_at = now
            for effect in control.step(message, now):
                if isinstance(effect, members.AnswerBeat):
                    down.send(BeatAnswered(effect.id), now)
        for message in down.arrived(now):
            leases.step(lease, message, now)
        leases.step(lease, Tick(), now)
        if lease.fenced and fenced_at is None:
            fenced_at = now
        if not lease.fenced and now >= beat + 1:
            beat += 1
            leases.step(lease, BeatSent(beat), now)
            up.send(members.Beat("n0", 1, beat), now)
        if any(isinstance(effect, NodeDead) for effect in control.step(members.Tick(), now)):
            dead_at = now
    assert fenced_at is not None
    assert fenced_at < heard_at + timings.dead_s <= dead_at
