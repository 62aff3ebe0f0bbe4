"""The window of a mesh: never too much unanswered, and what waits goes in order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.rpc import calls
from miles_agents.rpc.calls import Window

MAX_CALLS, MAX_BYTES = 3, 100


class WindowMachine(RuleBasedStateMachine):
    """Against a list of who is under way and who waits."""

    def __init__(self):
        super().__init__()
        self.window = Window(max_calls=MAX_CALLS, max_bytes=MAX_BYTES)
        self.under_way = {}
        self.waiting = {}
        self.order = []
        self.gone = set()
        self.rid = 0

    @rule(size=st.integers(1, 150))
    def call(self, size):
        self.rid += 1
        if self.window.admit(self.rid, size):
            assert not self.waiting, "overtook those that wait"
            self.start(self.rid, size)
        else:
            assert self.under_way, "waits for nothing"
            self.waiting[self.rid] = size

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def one_under_way_ends(self, data):
        rid = data.draw(st.sampled_from(list(self.under_way)))
        self.leave(rid, self.under_way.pop(rid))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_that_waits_gives_up(self, data):
        rid = data.draw(st.sampled_from(list(self.waiting)))
        self.gone.add(rid)
        self.leave(rid, self.waiting.pop(rid))

    def leave(self, rid, size):
        for ready in self.window.leave(rid, size):
            self.start(ready, self.waiting.pop(ready))

    def start(self, rid, size):
        assert rid not in self.gone
        self.under_way[rid] = size
        self.order.append(rid)

    @invariant()
    def bounds_hold(self):
        assert len(self.under_way) <= MAX_CALLS
        assert sum(self.under_way.values()) <= MAX_BYTES or len(self.under_way) == 1
        assert (self.window.calls, self.window.bytes) == (len(self.under_way), sum(self.under_way.values()))

    @invariant()
    def order_holds(self):
        assert self.order == sorted(self.order)

    @invariant()
    def nobody_waits_without_need(self):
        assert self.window.num_waiting == len(self.waiting)
        assert all(self.window.is_waiting(rid) for rid in self.waiting)
        assert self.under_way or not self.waiting


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_one_message_larger_than_the_window_goes_alone():
    window = Window(max_bytes=100)
    assert window.admit(1, 1000)
    assert not window.admit(2, 1)
    assert window.leave(1, 1000) == [2]


def test_waiting_has_bounds_too():
    window = Window(max_calls=1)
    assert not window.is_overfull(calls.MAX_WAITING_BYTES)
    window.admit(1, 1)
    window.admit(2, calls.MAX_WAITING_BYTES)
    assert window.is_overfull(calls.MAX_BYTES + 1)
    assert window.leave(2, calls.MAX_WAITING_BYTES) == []
    for rid in range(3, 3 + calls.MAX_WAITING_CALLS):
        assert not window.is_overfull(1)
        window.admit(rid, 0)
    assert window.is_overfull(0)
