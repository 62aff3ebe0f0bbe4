"""The transaction of weight updates, as a state machine: what holds whatever happens in whatever order."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_controller.weight_versions import (
    Begin,
    CatchUp,
    Do,
    EngineFailed,
    Fence,
    Finished,
    Holds,
    Joined,
    Left,
    Send,
    SendFailed,
    Sent,
    Step,
    StepDone,
    UpdateOutOfOrder,
    Versions,
    step,
)

ORDER = [Step.PAUSE, Step.FLUSH, Step.OPEN, Step.SEND, Step.COMMIT, Step.CLOSE, Step.RESUME]


def fleet(*names):
    state = Versions()
    for name in names:
        state, effects = step(state, Joined(name, 0))
        assert effects == []
    return state


class World:
    """Engines as they really are: what they hold, what they report, whether they generate. Plays the shell."""

    def __init__(self, names):
        self.state = fleet(*names)
        self.bytes = dict.fromkeys(names, 0)
        self.reported = dict.fromkeys(names, 0)
        self.generating = dict.fromkeys(names, True)
        self.fenced = set()
        self.open = []
        self.steps = []
        self.finished = []
        self.committed = [0]

    def happen(self, event):
        self.state, effects = step(self.state, event)
        if self.state.version != self.committed[-1]:
            self.committed.append(self.state.version)
        for effect in effects:
            self.steps.append(effect)
            match effect:
                case Do() | Send():
                    self.open.append(effect)
                case Fence(engine):
                    self.fenced.add(engine)
                    self.generating[engine] = False
                case Finished():
                    self.finished.append(effect)
        self.check()

    def come_back(self, name):
        """It dies, and its successor has loaded something from disk; it does not generate."""
        self.happen(EngineFailed(name, "died"))
        self.fenced.discard(name)
        self.bytes[name], self.reported[name] = "disk", "default"
        self.happen(Joined(name, None))

    def check(self):
        for name, generating in self.generating.items():
            if generating:
                assert self.bytes[name] == self.reported[name], f"{name} generates with what it does not report"
        assert self.committed == sorted(set(self.committed)), "versions go back"

    def carry_out(self, step_, engine, version):
        """What an engine does when it is told to."""
        if step_ is Step.PAUSE:
            self.generating[engine] = False
        elif step_ is Step.COMMIT:
            self.reported[engine] = version
        elif step_ is Step.RESUME:
            assert self.bytes[engine] == self.reported[engine] == version, f"{engine} is resumed with other weights"
            assert engine not in self.fenced
            self.generating[engine] = True


def play(world, decide):
    """Until nothing is left to be done. ``decide(what)`` says how each thing ends."""
    while world.open:
        effect = world.open.pop(0)
        if isinstance(effect, Send):
            missed = [name for name in effect.engines if decide("send") == "miss"]
            for name in effect.engines:
                if name not in missed:
                    world.bytes[name] = effect.version
                else:
                    world.bytes[name] = "half"
            died = [name for name in effect.engines if decide("die in send") == "die"]
            for name in died:
                world.happen(EngineFailed(name, "died"))
            unknown = decide("trainer") == "fails"
            if unknown:
                for name in effect.engines:
                    world.bytes[name] = "half"
            world.happen(SendFailed((), "trainer") if unknown else SendFailed(tuple(missed), "x") if missed else Sent())
            continue
        names = list(effect.engines)
        decide.shuffle(names)
        for name in names:
            if decide("step") == "fail":
                world.happen(EngineFailed(name, "failed"))
            else:
                if name not in world.fenced:
                    world.carry_out(effect.step, name, effect.version)
                world.happen(StepDone(name, effect.step))


class Decide:
    def __init__(self, seed, chance):
        self.random, self.chance = random.Random(seed), chance
        self.shuffle = self.random.shuffle

    def __call__(self, what):
        bad = {"send": "miss", "die in send": "die", "trainer": "fails", "step": "fail"}[what]
        return bad if self.random.random() < self.chance else "well"


def test_an_update_goes_through_its_steps_in_order_and_all_engines_hold_it():
    world = World(["a", "b"])
    world.happen(Begin(1))
    play(world, Decide(0, 0.0))
    assert [e.step if isinstance(e, Do) else Step.SEND for e in world.steps if isinstance(e, Do | Send)] == ORDER
    assert world.finished == [Finished(1, ("a", "b"))]
    assert world.state.version == 1 and set(world.state.engines.values()) == {Holds.CURRENT}


def test_no_engine_goes_on_to_a_step_before_all_have_done_the_one_before():
    state, _ = step(fleet("a", "b"), Begin(1))
    state, effects = step(state, StepDone("a", Step.PAUSE))
    assert effects == []
    state, effects = step(state, StepDone("b", Step.PAUSE))
    assert effects == [Do(Step.FLUSH, ("a", "b"), 1)]


def test_an_engine_that_fails_is_fenced_and_the_others_go_on():
    state, _ = step(fleet("a", "b"), Begin(1))
    state, _ = step(state, StepDone("a", Step.PAUSE))
    state, effects = step(state, EngineFailed("b", "why"))
    assert effects == [Fence("b", "why"), Do(Step.FLUSH, ("a",), 1)]
    assert state.engines["b"] is Holds.FENCED


def test_engines_that_missed_the_weights_are_fenced_and_the_others_commit():
    state = _until_send(fleet("a", "b"))
    state, effects = step(state, SendFailed(("b",), "why"))
    assert effects == [Fence("b", "why"), Do(Step.COMMIT, ("a",), 1)]


def test_a_trainer_that_fails_leaves_no_engine_of_which_anybody_knows_what_it_holds():
    state, effects = step(_until_send(fleet("a", "b")), SendFailed((), "gone"))
    assert effects == [Fence("a", "gone"), Fence("b", "gone"), Finished(1, ())]
    assert state.version == 0 and state.update is None


def test_an_engine_that_dies_while_weights_are_sent_is_out_and_the_sender_is_waited_for():
    state = _until_send(fleet("a"))
    state, effects = step(state, EngineFailed("a", "died"))
    assert effects == [Fence("a", "died")] and state.update is not None
    state, effects = step(state, SendFailed(("a",), "died"))
    assert effects == [Finished(1, ())]


def test_an_engine_that_comes_with_old_weights_waits_for_the_next_update():
    world = World(["a"])
    world.happen(Begin(1))
    play(world, Decide(0, 0.0))
    world.bytes["b"] = world.reported["b"] = 0
    world.generating["b"] = False
    world.happen(Joined("b", 0))
    assert world.state.engines["b"] is Holds.STALE
    world.happen(Begin(2))
    play(world, Decide(0, 0.0))
    assert world.generating["b"] and world.state.engines["b"] is Holds.CURRENT


def test_an_engine_that_comes_during_an_update_is_stale_when_that_is_over():
    state = _until_send(fleet("a"))
    state, _ = step(state, Joined("b", 0))
    state, _ = step(state, Sent())
    for which in (Step.COMMIT, Step.CLOSE, Step.RESUME):
        state, _ = step(state, StepDone("a", which))
    assert state.engines == {"a": Holds.CURRENT, "b": Holds.STALE}


def test_a_second_update_and_one_that_goes_back_are_refused():
    state, _ = step(fleet("a"), Begin(3))
    with pytest.raises(UpdateOutOfOrder, match="cannot come now") as caught:
        step(state, Begin(4))
    assert "update to 3, step pause" in caught.value.evidence
    with pytest.raises(UpdateOutOfOrder):
        step(Versions(version=3), Begin(3))
    with pytest.raises(UpdateOutOfOrder):
        step(fleet("a"), Sent())
    with pytest.raises(UpdateOutOfOrder):
        step(state, StepDone("a", Step.CLOSE))


def test_without_engines_an_update_ends_at_once():
    assert step(Versions(), Begin(1))[1] == [Finished(1, ())]


def test_an_engine_that_is_gone_is_forgotten():
    state, effects = step(fleet("a", "b"), Left("a"))
    assert effects == [Fence("a", "it is gone")] and set(state.engines) == {"b"}


@given(st.integers(1, 4), st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.3]), st.integers(1, 5))
def test_whatever_fails_no_engine_generates_with_weights_that_it_does_not_report(num_engines, seed, chance, updates):
    world, decide = World([f"e{index}" for index in range(num_engines)]), Decide(seed, chance)
    for number in range(1, updates + 1):
        before = world.state.version
        world.happen(Begin(before + decide.random.randint(1, 3)))
        play(world, decide)
        assert world.state.update is None and len(world.finished) == number
        finished = world.finished[-1]
        assert set(finished.engines) == {name for name, generating in world.generating.items() if generating}
        if finished.engines:
            assert world.state.version == finished.version > before
        for name, holds in world.state.engines.items():
            assert (holds is Holds.FENCED) == (name in world.fenced)
            assert (holds is Holds.CURRENT) == world.generating[name]


def test_a_catch_up_gives_stale_engines_the_committed_version_and_leaves_the_others_alone():
    world = World(["a", "b"])
    world.happen(Begin(1))
    play(world, Decide(0, 0.0))
    world.come_back("b")
    world.steps.clear()
    world.happen(CatchUp())
    play(world, Decide(0, 0.0))
    assert {name for effect in world.steps if isinstance(effect, Do | Send) for name in effect.engines} == {"b"}
    assert [e.step if isinstance(e, Do) else Step.SEND for e in world.steps if isinstance(e, Do | Send)] == ORDER
    assert world.finished[-1] == Finished(1, ("b",)) and world.committed == [0, 1]
    assert set(world.state.engines.values()) == {Holds.CURRENT} and all(world.generating.values())


def test_a_catch_up_without_stale_engines_does_nothing_and_none_begins_in_an_update():
    state = fleet("a")
    assert step(state, CatchUp()) == (state, [Finished(0, ())])
    state, _ = step(state, Begin(1))
    with pytest.raises(UpdateOutOfOrder):
        step(state, CatchUp())


@given(st.integers(2, 4), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.3]))
def test_engines_that_come_back_and_catch_up_generate_with_what_they_report(num_engines, seed, chance):
    world, decide = World([f"e{index}" for index in range(num_engines)]), Decide(seed, chance)
    for _ in range(8):
        for name in [name for name in world.generating if name in world.fenced or decide.random.random() < 0.2]:
            world.come_back(name)
        others = {name for name, holds in world.state.engines.items() if holds is Holds.CURRENT}
        version, is_catch_up = world.state.version, decide.random.random() < 0.5
        world.happen(CatchUp() if is_catch_up else Begin(version + 1))
        play(world, decide)
        assert world.state.update is None
        if is_catch_up:
            assert world.state.version == version and all(world.generating[name] for name in others)
        for name, holds in world.state.engines.items():
            assert (holds is Holds.CURRENT) == world.generating[name]
            assert holds is not Holds.CURRENT or world.bytes[name] == world.state.version


def _until_send(state):
    state, effects = step(state, Begin(1))
    while not isinstance(effects[-1], Send):
        for name in effects[-1].engines:
            state, more = step(state, StepDone(name, effects[-1].step))
        effects = more
    return state
