"""The queue of a tracker: order, bounds, pauses, and what is said; on a clock of the test's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.tracking.delivery import MAX_TRIES, Delivery


def queue(*items, limit=3):
    delivery = Delivery("T", limit)
    said = [line for item in ("begin", *items) for line in delivery.put(item)]
    return delivery, said


def test_items_leave_in_order():
    delivery, _ = queue(1, 2)
    seen = []
    while (item := delivery.due(0.0)[0]) is not None:
        seen.append(item)
        assert delivery.done() == []
    assert seen == ["begin", 1, 2]
    assert delivery.due(0.0) == (None, None)


def test_a_full_queue_drops_the_oldest_but_not_the_beginning_and_says_so_once():
    delivery, said = queue(1, 2, 3, 4, 5)
    assert len(said) == 1
    assert "T is too slow" in said[0]
    assert delivery.lost == 3
    left = []
    while (item := delivery.due(0.0)[0]) is not None:
        left.append(item)
        delivery.done()
    assert left == ["begin", 4, 5]


def test_failures_are_tried_again_with_growing_pauses_said_once_and_so_is_recovery():
    delivery, _ = queue(1)
    delivery.done()
    said = delivery.failed(10.0, "E")
    assert len(said) == 1
    assert "T failed and is tried again: E" in said[0]
    assert delivery.due(10.5) == (None, 0.5)
    assert delivery.due(11.0) == (1, None)
    assert delivery.failed(11.0, "E") == []
    assert delivery.due(11.0) == (None, 2.0)
    assert delivery.done() == ["T works again"]
    delivery.put(2)
    assert delivery.failed(20.0, "F") == []
    assert delivery.done() == []
    assert delivery.lost == 0


def test_an_item_that_never_goes_is_given_up_and_the_next_one_has_its_turn():
    delivery, _ = queue(1, 2)
    delivery.done()
    now = 0.0
    for _ in range(MAX_TRIES):
        item, pause = delivery.due(now)
        if pause is not None:
            now += pause
            item, _ = delivery.due(now)
        assert item == 1
        delivery.failed(now, "E")
        assert delivery._pause_until - now <= 60.0
    assert delivery.lost == 1
    assert delivery.due(now + 60.0)[0] == 2


def test_a_tracker_that_cannot_begin_is_given_up_with_everything():
    delivery, _ = queue(1, 2)
    said = [line for _ in range(MAX_TRIES) for line in delivery.failed(0.0, "E")]
    assert said[-1].startswith("T is given up: it could not begin")
    assert (delivery.waiting, delivery.lost, delivery.is_given_up) == (0, 3, True)
    assert delivery.put(3) == []
    assert (delivery.waiting, delivery.lost) == (0, 4)


def test_at_the_end_pauses_are_short():
    delivery, _ = queue(1)
    delivery.done()
    for _ in range(5):
        delivery.failed(100.0, "E")
    delivery.end()
    assert delivery.due(100.0) == (1, None)
    delivery.failed(100.0, "E")
    assert delivery.due(100.0)[1] == pytest.approx(0.5)


@given(st.lists(st.sampled_from(["put", "done", "failed", "wait"]), max_size=200), st.integers(2, 5))
def test_whatever_happens_items_are_delivered_in_order_or_counted_as_lost(events, limit):
    delivery, now, count, delivered = Delivery("T", limit), 0.0, 0, []
    said = []
    for event in events:
        if event == "put":
            said += delivery.put(count)
            count += 1
        elif event == "wait":
            now += 7.0
        else:
            item, _ = delivery.due(now)
            if item is None:
                continue
            if event == "done":
                delivered.append(item)
                said += delivery.done()
            else:
                said += delivery.failed(now, "E")
        assert delivery.waiting <= limit
    assert delivered == sorted(set(delivered))
    assert len(delivered) + delivery.waiting + delivery.lost == count
    assert len(said) == len(set(said)) <= 4
