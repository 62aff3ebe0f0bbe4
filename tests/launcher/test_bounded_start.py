"""Many nodes, some at a time, on virtual time: nobody waits for those that hang or refuse, and each has its reason."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_agents.errors import EnvironmentFault
from miles_agents.virtual_time import run_virtual
from miles_launcher.bounded_start import StartTooSlow, start_all


class Refuses(EnvironmentFault):
    """A node that says no."""

    code = "E-TEST-001"


class Nodes:
    """``seconds``: of each node's start; None: it hangs. A negative one refuses after that time."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.under_way = set()
        self.most = 0
        self.given_up = []

    async def start(self, node):
        self.under_way.add(node)
        self.most = max(self.most, len(self.under_way))
        wait = self.seconds[node]
        await asyncio.sleep(1e6 if wait is None else abs(wait))
        if wait < 0:
            raise Refuses(f"{node} refuses")
        self.under_way.discard(node)

    async def give_up(self, node):
        await asyncio.sleep(0.5)
        self.given_up.append(node)
        self.under_way.discard(node)

    def doing(self, node):
        return f"{node} to wake up"


def start(seconds, **options):
    nodes = Nodes(seconds)
    return nodes, run_virtual(start_all(list(seconds), nodes, **options), limit_s=None)


def test_a_thousand_of_which_some_hang_and_some_refuse():
    seconds = {f"n{i}": None if i % 100 == 7 else -1.0 if i % 100 == 8 else 3.0 for i in range(1000)}
    nodes, report = start(seconds, at_once=64, timeout_s=30.0)
    assert len(report.joined) == 980
    assert len(report.failed) == 20 == len(nodes.given_up)
    assert nodes.under_way == set()
    assert nodes.most == 64
    hung = report.failed["n7"]
    assert isinstance(hung, StartTooSlow)
    assert "waiting for: n7 to wake up" in str(hung)
    assert isinstance(report.failed["n8"], Refuses)
    # 980 x 3 s, 10 x 30.5 s and 10 x 1.5 s over 64 turns, and the longest begins last at the worst.
    assert report.seconds < (980 * 3 + 10 * 30.5 + 10 * 1.5) / 64 + 30.5


@settings(max_examples=60)
@given(st.lists(st.one_of(st.none(), st.floats(-20, 20)), max_size=30), st.integers(1, 8))
def test_each_has_joined_or_failed_and_no_more_than_allowed_are_under_way(times, at_once):
    seconds = {f"n{i}": wait for i, wait in enumerate(times)}
    nodes, report = start(seconds, at_once=at_once, timeout_s=10.0)
    well = [node for node, wait in seconds.items() if wait is not None and 0 <= wait < 10]
    assert list(report.joined) == well
    assert list(report.failed) == [node for node in seconds if node not in well]
    assert sorted(nodes.given_up) == sorted(report.failed)
    assert nodes.most <= at_once


def test_who_is_cancelled_gives_up_what_was_begun():
    async def story():
        nodes = Nodes({"a": 5.0, "b": 1.0, "c": 1.0})
        task = asyncio.ensure_future(start_all(["a", "b", "c"], nodes, at_once=2, timeout_s=60.0))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(nodes.given_up) == ["a", "b"]

    run_virtual(story())
