"""Fully asynchronous: whatever happens to engines, weights and the rollout manager, nothing is trained on that is older
than the bound, nothing is lost, nothing is trained on twice."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fully_async_world import TARGET, EnginesAndTrainer, ManagerLife

from miles.rollout.admission import Admission, staleness
from miles.rollout.hooks import close_hook_pool
from miles.rollout.inference_rollout.inference_rollout_common import SharedGenerateState
from miles.rollout.journal import replay
from miles.rollout.ledger import ImpossibleTransition, Ledger, Transition
from miles.utils.http_utils import close_http_client
from miles.utils.misc import SingletonMeta
from miles.utils.types import Sample

VERSION = 9
ENOUGH_ROLLOUTS = 40
WHICH = st.integers(0, 11)


def made(index, spans):
    """A sample as the engine reports it: spans of tokens by the version that made them, the last one by itself."""
    sample = Sample(index=index)
    reported = [{"version": str(version), "start": 0, "end": 1} for version in spans]
    meta = {"finish_reason": {"type": "stop"}, "weight_version": str(spans[-1])}
    sample.update_from_meta_info(SimpleNamespace(), meta | ({"weight_versions": reported} if len(spans) > 1 else {}))
    return sample


def close_after_life():
    """What a process of the rollout manager has one of."""
    close_http_client()
    close_hook_pool()
    SingletonMeta.clear_instances(SharedGenerateState)


class FullyAsync(RuleBasedStateMachine):
    """The training loop, engines and the fate of the manager, in any order that the loop allows. The loop asks for a
    rollout, trains on it, and updates weights: in its turn, or at once while it waits for the rollout."""

    @initialize(bound=st.sampled_from([0, 0, 1, 2]), handler=st.sampled_from(["retry", "drop"]))
    def begin(self, bound, handler):
        self.directory, self.bound, self.handler = Path(tempfile.mkdtemp()), bound, handler
        self.world = EnginesAndTrainer()
        self.is_asked = self.may_update = False
        self.num_failed = 0
        self.life = self.new_life()
        self.life.run(self.life.recovery.begin({}, -1))
        self.life.source.weights_are(self.world.version)

    def new_life(self):
        return ManagerLife(self.world, self.directory, bound=self.bound, handler=self.handler)

    @property
    def rollout_id(self):
        return self.world.num_trained_rollouts

    # -- engines

    @precondition(lambda self: self.world.requests)
    @rule(which=WHICH)
    def a_token_is_made(self, which):
        self.world.work(self.world.requests[which % len(self.world.requests)])

    @precondition(lambda self: self.world.requests)
    @rule(which=WHICH, how=st.sampled_from(["stop", "stop", "stop", "abort", "fails"]))
    def an_answer_ends(self, which, how):
        request = self.world.requests[which % len(self.world.requests)]
        if how == "stop":
            self.world.work(request)
        self.num_failed = self.num_failed + 1 if how == "fails" else 0
        # So many in a row end a run, with reason.
        request.ends.set_result(how if self.num_failed < 4 else "abort")
        self.life.settle()

    @precondition(lambda self: self.world.requests)
    @rule(which=WHICH)
    def a_group_is_finished(self, which):
        self.world.finish_group(which)
        self.life.settle()

    # -- the loop

    @precondition(lambda self: not self.is_asked)
    @rule()
    def a_rollout_is_asked_for(self):
        self.is_asked, self.may_update = True, False
        self.life.generate(self.rollout_id)

    @precondition(lambda self: self.may_update)
    @rule()
    def weights_are_updated(self):
        self.may_update = False
        self.world.version += 1
        self.life.source.weights_are(self.world.version)

    @precondition(lambda self: self.is_asked and not self.world.announced)
    @rule()
    def an_update_at_once_is_announced(self):
        self.world.announced = self.world.version + 1
        if not self.life.source.may_become(self.world.announced):
            self.world.announced = 0

    @precondition(lambda self: self.world.announced)
    @rule()
    def the_announced_update_is_made(self):
        self.world.version, self.world.announced = self.world.announced, 0
        self.life.source.weights_are(self.world.version)

    @precondition(lambda self: self.life.is_shipped and not self.world.announced)
    @rule(hears=st.booleans())
    def it_is_trained_on(self, hears=True):
        world, (numbers, tokens) = self.world, self.life.batch
        assert len(numbers) == TARGET
        ages = [world.version - min(world.made_by[token] for token in of) for of in tokens]
        assert max(ages) <= self.bound, f"a token of age {max(ages)} is trained on"
        assert not set(numbers) & set(world.trained), "a group is trained on twice"
        world.trained += numbers
        world.num_trained_rollouts += 1
        self.is_asked, self.may_update = False, True
        if not hears:
            self.it_dies()
            return
        self.life.batch, self.life.is_shipped = None, False
        self.life.source.trained(self.rollout_id - 1)

    # -- the rollout manager

    @precondition(lambda self: self.life.call is not None and self.life.call.done())
    @rule(is_written=st.sampled_from([True, True, False]))
    def its_groups_are_selected(self, is_written=False):
        self.life.select()
        if is_written:
            self.life.ship(self.rollout_id)

    @precondition(lambda self: self.life.batch is not None and not self.life.is_shipped)
    @rule()
    def batch_and_state_are_written(self):
        self.life.ship(self.rollout_id)

    @rule()
    def it_dies(self):
        self.life.end(dies=True)
        self.life = self.new_life()
        self.life.run(self.life.recovery.restore(self.rollout_id - 1))
        self.life.source.weights_are(self.world.announced or self.world.version)
        if self.is_asked:
            self.life.generate(self.rollout_id)

    # -- what always holds

    @invariant()
    def every_prompt_is_at_one_place(self):
        source, ledger = self.life.source, self.life.source.ledger
        assert replay(self.directory / "journal.jsonl") == ledger
        assert ledger.oldest <= self.bound
        assert source.inner.next == ledger.num_trained + ledger.num_filtered + len(ledger.returned) + len(ledger.open)
        assert set(source._open) == set(ledger.open)
        there = [group[0].group_index for group in (*source.inner.buffer, *source.overflow, *source._coming_back)]
        assert sorted(there) == sorted(ledger.returned)
        assert ledger.num_trained == len(self.world.trained)

    def teardown(self):
        if not hasattr(self, "life"):
            return
        try:
            self.nothing_is_lost()
        finally:
            self.life.end(dies=False)
            close_after_life()
            shutil.rmtree(self.directory)

    def nothing_is_lost(self):
        """What was taken until now is trained on, if engines answer and the run goes on; or filtered, and counted."""
        ledger = self.life.source.ledger
        waiting, num_filtered = set(ledger.open) | ledger.returned, ledger.num_filtered
        for _ in range(ENOUGH_ROLLOUTS):
            if len(waiting - set(self.world.trained)) <= ledger.num_filtered - num_filtered:
                break
            self.one_rollout()
        lost = waiting - set(self.world.trained)
        assert len(lost) <= ledger.num_filtered - num_filtered, f"groups {sorted(lost)} are lost"

    def one_rollout(self):
        if self.world.announced:
            self.the_announced_update_is_made()
        if not self.is_asked:
            self.a_rollout_is_asked_for()
        while self.life.batch is None:
            if self.life.call.done():
                self.its_groups_are_selected()
            else:
                self.a_group_is_finished(0)
        if not self.life.is_shipped:
            self.batch_and_state_are_written()
        self.it_is_trained_on()


TestFullyAsync = FullyAsync.TestCase
TestFullyAsync.settings = settings(max_examples=12, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize(
    ("spans", "versions", "age"),
    [([9], ["9"], 0), ([7, 9], ["7", "9"], 2), ([6, 7, 8], ["6", "7", "8"], 3)],
)
def test_an_answer_is_as_old_as_its_first_token(spans, versions, age):
    sample = made(0, spans)
    assert sample.weight_versions == versions
    assert staleness([sample], VERSION) == age


@pytest.fixture
def life(tmp_path):
    """A rollout manager that trains on nothing but what the weights of the moment made."""
    world = EnginesAndTrainer()
    made = ManagerLife(world, tmp_path, bound=0, handler="drop")
    made.source.weights_are(world.version)
    yield made
    made.end(dies=False)
    close_after_life()


def test_what_was_finished_before_an_update_in_the_middle_of_a_call_is_judged_after_it(life):
    world, source = life.world, life.source
    life.generate(0)
    world.finish_group(0)
    life.settle()
    assert source.may_become(2)
    world.version = 2
    while not life.call.done():
        world.finish_group(-1)
        life.settle()
    life.select()
    _, tokens = life.batch
    assert {world.made_by[token] for of in tokens for token in of} == {2}
    assert source.ledger.reasons["stale"] > 0
    assert not source.may_become(3)
    source.trained(0)
    assert source.may_become(3)


def test_weights_stay_for_a_batch_that_a_successor_gives_again(tmp_path):
    world = EnginesAndTrainer()
    life = ManagerLife(world, tmp_path, bound=0, handler="drop")
    life.run(life.recovery.begin({}, -1))
    life.source.weights_are(1)
    life.generate(0)
    while not life.call.done():
        world.finish_group(0)
        life.settle()
    life.select()
    life.ship(0)
    life.end(dies=True)
    life = ManagerLife(world, tmp_path, bound=0, handler="drop")
    try:
        life.run(life.recovery.restore(-1))
        life.source.weights_are(1)
        assert not life.source.may_become(2)
        life.generate(0)
        assert life.is_shipped
        assert not life.source.may_become(2)
        life.source.trained(0)
        assert life.source.may_become(2)
    finally:
        life.end(dies=False)
        close_after_life()


def test_weights_do_not_change_between_admission_and_training():
    admission = Admission(bound=1, version=3)
    assert admission.admit(7, [[made(0, [2])]]) == []
    assert not admission.may_become(4)
    assert admission.version == 3
    admission.ended(6)
    assert not admission.may_become(4)
    admission.ended(7)
    assert admission.may_become(4)
    [old] = admission.admit(8, [[made(0, [2])], [made(1, [3])]])
    assert staleness(old, 4) == 2
    assert admission.may_become(5)  # nothing was admitted


def test_the_ledger_selects_nothing_that_is_older_than_its_bound():
    ledger = Ledger(bound=1)
    for group in (0, 1):
        ledger.apply(Transition("take", group, 0, "fresh"))
    ledger.apply(Transition("select", 0, 0, age=1))
    with pytest.raises(ImpossibleTransition, match="cannot select") as caught:
        ledger.apply(Transition("select", 1, 0, age=2))
    assert "2 weight versions old, and the bound is 1" in str(caught.value)
    assert (ledger.selected, ledger.oldest) == ({0}, 1)
