"""The ledger: every taking of a prompt group ends exactly once; the journal leads to the same ledger."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from miles.rollout.journal import DamagedJournal, Journal, replay
from miles.rollout.ledger import ImpossibleTransition, Ledger, Transition

KINDS = ("take", "select", "filter", "give_back", "train")


class Model(RuleBasedStateMachine):
    """Any step at any time: what the ledger takes agrees with a list of lives, what it refuses changes nothing."""

    def __init__(self):
        super().__init__()
        self.ledger = Ledger()
        self.where = {}
        self.ends = {"trained": 0, "filtered": 0, "returned": 0}
        self.takings = 0

    @rule(
        kind=st.sampled_from(KINDS), group=st.integers(0, 5), rollout_id=st.integers(0, 2),
        why=st.sampled_from(["", "fresh", "buffer", "foreign", "zero_std"]),
    )  # fmt: skip
    def step(self, kind, group, rollout_id, why):
        before = self.ledger.to_plain()
        try:
            self.ledger.apply(Transition(kind, group, rollout_id, why))
        except ImpossibleTransition:
            assert self.ledger.to_plain() == before
            assert not self._may(kind, group, why)
            return
        assert self._may(kind, group, why)
        self._follow(kind, group)

    def _may(self, kind, group, why):
        at = self.where.get(group, "nowhere")
        if kind == "take":
            return at == ("returned" if why == "buffer" else "nowhere")
        if kind == "filter":
            return at in ("taken", "selected") and why != ""
        return at in {"select": ("taken",), "give_back": ("taken", "selected"), "train": ("selected",)}[kind]

    def _follow(self, kind, group):
        if kind == "take":
            self.takings += 1
            self.where[group] = "taken"
        elif kind == "select":
            self.where[group] = "selected"
        else:
            self.ends[{"filter": "filtered", "give_back": "returned", "train": "trained"}[kind]] += 1
            self.where[group] = "returned" if kind == "give_back" else "nowhere"

    @rule()
    def copy(self):
        assert Ledger.from_plain(self.ledger.to_plain()) == self.ledger

    @invariant()
    def every_taking_has_one_end_or_is_open(self):
        ledger = self.ledger
        assert ledger.num_taken == self.takings
        assert (ledger.num_trained, ledger.num_filtered, ledger.num_returned) == tuple(self.ends.values())
        assert self.takings == sum(self.ends.values()) + len(ledger.open)
        assert ledger.selected <= set(ledger.open)
        assert ledger.returned == {g for g, at in self.where.items() if at == "returned"}

    @invariant()
    def a_closed_ledger_has_nothing_open(self):
        closed = self.ledger.closed("checkpoint")
        assert not closed.open
        assert closed.returned == self.ledger.returned | set(self.ledger.open)


TestLedger = Model.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def steps_of_a_rollout():
    return [
        Transition("take", 0, 0, "fresh"), Transition("take", 1, 0, "fresh"), Transition("take", 2, 0, "fresh"),
        Transition("filter", 1, 0, "zero_std_0.0"), Transition("give_back", 2, 0, "surplus"),
        Transition("select", 0, 0), Transition("train", 0, 0),
    ]  # fmt: skip


def written(path, steps):
    ledger, journal = Ledger(), Journal(path)
    journal.state(ledger, "begin")
    for step in steps:
        ledger.apply(step)
        journal.append([step])
    journal.close()
    return ledger


def test_the_journal_leads_to_the_same_ledger(tmp_path):
    path = tmp_path / "journal" / "rollout.jsonl"
    ledger = written(path, steps_of_a_rollout())
    assert replay(path) == ledger
    assert ledger.describe() == "3 taken = 1 trained + 1 filtered + 1 returned + 0 open"


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "rollout.jsonl"
    written(path, steps_of_a_rollout())
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    shorter = replay(path)
    assert shorter.num_trained == 0
    assert len(shorter.open) == 1
    journal = Journal(path)
    journal.append([Transition("train", 0, 0)])
    journal.close()
    assert replay(path).num_trained == 1


def test_what_stands_before_a_restored_state_does_not_count(tmp_path):
    path = tmp_path / "rollout.jsonl"
    written(path, steps_of_a_rollout())
    journal = Journal(path)
    journal.state(Ledger(), "restored from a checkpoint")
    journal.append([Transition("take", 0, 0, "fresh")])
    journal.close()
    assert replay(path).describe() == "1 taken = 0 trained + 0 filtered + 0 returned + 1 open"


def test_a_broken_line_inside_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rollout.jsonl"
    written(path, steps_of_a_rollout())
    lines = path.read_bytes().splitlines()
    lines[2] = lines[2][:9]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DamagedJournal, match="line 3"):
        replay(path)


def test_no_journal_is_an_empty_ledger(tmp_path):
    assert replay(tmp_path / "none.jsonl") == Ledger()


def test_a_refusal_says_what_is_wrong():
    ledger = Ledger()
    ledger.apply(Transition("take", 7, 3, "fresh"))
    with pytest.raises(ImpossibleTransition) as caught:
        ledger.apply(Transition("take", 7, 4, "fresh"))
    assert "prompt group 7 cannot take" in str(caught.value)
    assert "taken already, for rollout 3" in str(caught.value)
