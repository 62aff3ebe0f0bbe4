"""The callee's list: a request runs at most once, and never after it was cancelled or too late."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from miles_agents.rpc.actor import EndpointInfo
from miles_agents.rpc.inbox import Cancelling, Claim, Inbox, Request, Stage
from miles_agents.rpc.inflight import RequestKey
from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import Address, Envelope, Target

INFO = EndpointInfo("work", "main", False, False)
SENDER = Address(0, 0, 1)


def request(rid, deadline=None):
    envelope = Envelope(wire.CALL, rid, SENDER, 2, (0, 7, 0), 1, "work", deadline)
    return Request(RequestKey(SENDER, rid), envelope, Target(0, 7, 0), INFO, 0.0)


class InboxMachine(RuleBasedStateMachine):
    """Every request goes its way at most once, whatever order claims, cancels and ends come in."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.inbox = Inbox()
        self.now = 0.0
        self.rid = 0
        self.state = {}  # rid -> queued, running, over

    @rule(target=requests, patience=st.none() | st.floats(0.0, 5.0))
    def arrives(self, patience):
        self.rid += 1
        made = request(self.rid, None if patience is None else self.now + patience)
        assert self.inbox.add(made)
        self.state[self.rid] = "queued"
        return made

    @rule(known=requests)
    def arrives_again(self, known):
        if self.state[known.key.rid] == "over":
            return
        repeated = self.inbox.num_repeated
        assert not self.inbox.add(request(known.key.rid))
        assert self.inbox.num_repeated == repeated + 1

    @rule(step=st.floats(0.0, 3.0))
    def time_passes(self, step):
        self.now += step

    @rule(known=requests)
    def its_turn_comes(self, known):
        rid = known.key.rid
        if self.state[rid] == "running" or (self.state[rid] == "over" and not known.cancelled):
            return  # its thread claims a request once
        claim = self.inbox.claim(known, self.now)
        deadline = known.envelope.deadline
        if self.state[rid] == "over":
            assert claim is Claim.CANCELLED
        elif deadline is not None and self.now >= deadline:
            assert claim is Claim.EXPIRED
            assert self.inbox.over(known)
            self.state[rid] = "over"
        else:
            assert claim is Claim.RUN
            self.state[rid] = "running"

    @rule(known=requests)
    def is_cancelled(self, known):
        outcome, found = self.inbox.cancel(known.key)
        state = self.state[known.key.rid]
        expected = {"queued": Cancelling.DROPPED, "running": Cancelling.RUNNING, "over": Cancelling.UNKNOWN}
        assert outcome is expected[state]
        assert found is (None if state == "over" else known)
        if state == "queued":
            self.state[known.key.rid] = "over"

    @rule(known=requests)
    def ends(self, known):
        if self.state[known.key.rid] == "queued":
            return
        known.interrupt = lambda: None
        assert self.inbox.over(known) == (self.state[known.key.rid] == "running")
        assert known.interrupt is None
        self.state[known.key.rid] = "over"

    @invariant()
    def lists_agree(self):
        live = [rid for rid, state in self.state.items() if state != "over"]
        assert [r.key.rid for r in self.inbox.snapshot()] == live
        assert len(self.inbox) == len(live)
        assert all((r.stage is Stage.RUNNING) == (self.state[r.key.rid] == "running") for r in self.inbox.snapshot())


TestInbox = InboxMachine.TestCase
TestInbox.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_cancelled_request_never_runs_even_when_its_turn_comes_later():
    inbox, made = Inbox(), request(1)
    inbox.add(made)
    assert inbox.cancel(made.key) == (Cancelling.DROPPED, made)
    assert inbox.claim(made, 0.0) is Claim.CANCELLED
    assert made.stage is Stage.OVER


def test_a_running_request_that_is_cancelled_ends_once():
    inbox, made = Inbox(), request(1)
    inbox.add(made)
    assert inbox.claim(made, 0.0) is Claim.RUN
    assert inbox.cancel(made.key) == (Cancelling.RUNNING, made)
    assert made.cancelled
    assert inbox.over(made)
    assert not inbox.over(made)
