"""Log lines that thousands of nodes send at once: shown in order, at a bounded rate, and never ahead of other work."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from miles_agents.virtual_time import run_virtual
from miles_controller.log_intake import BURST_BYTES, MAX_HELD, SLICE_LINES, LogBudget, LogIntake


def batch(node, count):
    return iter([f"{node} {number}" for number in range(count)])


def intake_of(show):
    return LogIntake(show, lambda: None)


def test_the_budget_is_shared_by_all_senders_however_many_they_are():
    budget = LogBudget(rate=1000.0, burst=0.0)
    due = [(0.0, sender) for sender in range(50)]
    sent, now = 0, 0.0
    while now < 100.0:
        due.sort()
        now, sender = due.pop(0)
        sent += 100
        due.append((now + budget.take(100, now), sender))
    assert 0.9 * 100_000 <= sent <= 1.1 * 100_000 + 50 * 100


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(0, 10_000)), max_size=50))
def test_a_pause_is_never_longer_than_what_was_sent_is_worth(events):
    budget, now, total = LogBudget(rate=100.0, burst=50.0), 0.0, 0
    for later_s, size in events:
        now += later_s
        total += size
        assert 0.0 <= budget.take(size, now) <= total / 100.0


def test_after_a_quiet_time_a_burst_passes_without_a_pause():
    budget = LogBudget()
    assert budget.take(int(BURST_BYTES) // 2, 1000.0) == 0.0
    assert budget.take(int(BURST_BYTES), 1000.0) > 0.0
    assert budget.take(100, 2000.0) == 0.0


def test_lines_of_a_small_batch_are_shown_at_once():
    async def story():
        shown = []
        intake_of(shown.append).take(batch("a", 3), 100)
        assert shown == ["a 0", "a 1", "a 2"]

    run_virtual(story())


def test_a_flood_is_shown_in_order_and_other_work_goes_between_the_slices():
    async def story():
        shown = []
        intake = intake_of(shown.append)
        for node in range(20):
            intake.take(batch(node, 80), 8000)
        assert len(shown) == SLICE_LINES
        before = len(shown)
        while len(shown) < 1600:
            await asyncio.sleep(0)
            assert len(shown) - before <= 2 * SLICE_LINES
            before = len(shown)
        assert shown == [f"{node} {number}" for node in range(20) for number in range(80)]
        await asyncio.sleep(0.1)
        intake.take(batch("later", 1), 100)
        assert shown[-1] == "later 0"

    run_virtual(story())


def test_lines_that_take_long_to_show_slow_their_senders_and_leave_the_loop_to_others():
    async def story():
        loop = asyncio.get_running_loop()

        def show(_line):
            loop.spend(0.001)

        intake = intake_of(show)
        began = loop.time()
        pauses = [intake.take(batch(node, 80), 8000) for node in range(100)]
        assert max(pauses) <= 0.1
        await asyncio.sleep(1.0)
        assert intake.take(batch("a", 1), 100) > 0.5
        before = loop.time()
        await asyncio.sleep(0)
        assert loop.time() - before <= 0.051
        while intake.delay_s:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(1.0)
        assert loop.time() - began > 5 * 8.0 * 0.9

    run_virtual(story())


def test_what_nobody_can_hold_is_refused_and_what_is_held_is_shown_at_the_end():
    async def story():
        shown, refused = [], []
        intake = LogIntake(shown.append, lambda: refused.append(1))
        intake.take(batch("a", 200), MAX_HELD)
        intake.take(batch("b", 200), MAX_HELD)
        assert refused == [1]
        intake.close()
        assert len(shown) == 200

    run_virtual(story())
