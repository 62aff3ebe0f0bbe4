"""Lives of engines as a pure machine: budgets and backoff by hand, then a random world that never breaks the rules."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles.backends.sglang_utils.engine_lives import (
    ROUTER,
    Died,
    Ended,
    GiveUp,
    Hold,
    Lives,
    Recovered,
    Rejoined,
    Retire,
    Stage,
    Start,
    Started,
    Tick,
    step,
    wake_at,
)
from miles_controller.policy import Policy

POLICY = Policy("restart", max_restarts=2, window_s=100.0, backoff_s=1.0, backoff_cap_s=1.5)


class Run:
    """Feeds a state by hand."""

    def __init__(self, *names, **options):
        self.now = 0.0
        self.state = Lives.of(names, policy=POLICY, **options)

    def send(self, event):
        self.state, effects = step(self.state, event, self.now)
        return effects

    def restart(self, name, number, cause="died"):
        """From its death to its return."""
        assert self.send(Died(name, number, cause)) == [Retire(name, number, cause)]
        assert self.send(Ended(name, number)) == []
        self.now = wake_at(self.state)
        assert self.send(Tick()) == [Start(name, number + 1)]
        self.send(Started(name, number + 1))
        return self.send(Rejoined(name, number + 1, 5))


def test_what_dies_is_ended_started_after_a_backoff_and_told_when_it_serves_again():
    run = Run("a", "b")
    run.now = 10.0
    run.send(Died("a", 1, "killed"))
    run.now = 13.0
    assert run.send(Ended("a", 1)) == [Start("a", 2)], "the backoff is over already"
    assert run.state.engines_in(Stage.SERVING) == ["b"]
    run.send(Started("a", 2))
    assert run.state.engines_in(Stage.WAITING) == ["a"]
    run.now = 20.0
    assert run.send(Rejoined("a", 2, 7)) == [Recovered("a", "killed", 10.0, 7, 1)]
    assert run.state.engines_in(Stage.SERVING) == ["a", "b"]


def test_backoff_grows_up_to_its_bound_and_the_window_forgets():
    run = Run("a")
    run.restart("a", 1)
    assert run.now == 1.0
    run.restart("a", 2)
    assert run.now == 2.5
    run.now = 101.5  # the first has left the window, the second has not
    run.restart("a", 3)
    assert run.now == 103.0
    assert not run.state.reason


def test_a_budget_that_is_used_up_names_how_often_and_why():
    run = Run("a", "b")
    run.restart("a", 1, "first")
    run.restart("b", 1, "elsewhere")
    run.restart("a", 2, "second")
    retire, over = run.send(Died("a", 3, "third"))
    assert retire == Retire("a", 3, "third")
    assert over == GiveUp(
        "a", "a has failed 3 times, and 2 restarts within 100 s are used up", ("first", "second", "third")
    )
    assert run.send(Ended("a", 3)) == [] and wake_at(run.state) is None
    assert run.send(Died("b", 2, "too late")) == [Retire("b", 2, "too late")], "told once, and started no more"


def test_a_start_that_fails_counts_and_the_absence_is_told_from_its_begin():
    run = Run("a")
    run.send(Died("a", 1, "killed"))
    run.send(Ended("a", 1))
    run.now = 1.0
    run.send(Tick())
    assert run.send(Died("a", 2, "no memory")) == [Retire("a", 2, "no memory")]
    run.send(Ended("a", 2))
    run.now = 2.5
    assert run.send(Tick()) == [Start("a", 3)]
    run.send(Started("a", 3))
    assert run.send(Rejoined("a", 3, 1)) == [Recovered("a", "killed", 2.5, 1, 2)]


def test_what_can_never_start_ends_it_at_once():
    run = Run("a")
    assert run.send(Died("a", 1, "its node is gone", is_final=True))[1].reason == (
        "a cannot be started again: its node is gone"
    )


def test_nothing_is_started_while_memory_is_somebody_elses_but_the_router():
    run = Run("a", ROUTER)
    run.send(Hold(True))
    for name in ("a", ROUTER):
        run.send(Died(name, 1, "killed"))
        run.send(Ended(name, 1))
    run.now = 50.0
    assert run.send(Tick()) == [Start(ROUTER, 2)] and wake_at(run.state) is None
    assert run.send(Hold(False)) == [Start("a", 2)]


def test_engines_of_others_are_gone_for_good_and_the_last_ends_it():
    run = Run("a", "b", ROUTER, is_ours=False)
    assert run.send(Died("a", 1, "silent")) == [Retire("a", 1, "silent")]
    run.send(Ended("a", 1))
    run.now = 50.0
    assert run.send(Tick()) == [] and not run.state.reason
    run.restart(ROUTER, 1)
    assert run.send(Died("b", 1, "silent, too"))[1].reason == "no engine is left; the last: silent, too"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3)), max_size=6))
def test_events_of_other_lives_change_nothing(events):
    run = Run("a")
    run.restart("a", 1)
    before = run.state
    for name, number in events:
        if (name, number) != ("a", 2):
            for event in (Died(name, number, "x"), Ended(name, number), Started(name, number), Rejoined(name, 1, 1)):
                assert run.send(event) == []
    assert run.state == before


class World(RuleBasedStateMachine):
    """Processes as they are; plays a shell that is slow and in any order."""

    @initialize()
    def begin(self):
        self.now, self.over = 0.0, 0
        self.state = Lives.of(["a", "b", ROUTER], policy=POLICY)
        self.running = dict.fromkeys(self.state.lives, 1)
        self.todo, self.starts = [], []

    def send(self, event):
        self.state, effects = step(self.state, event, self.now)
        for effect in effects:
            match effect:
                case Retire():
                    self.todo.append(effect)
                case Start(name, number):
                    assert name not in self.running, "two processes of a name"
                    assert not self.over, "started after the end"
                    self.running[name] = number
                    self.todo.append(effect)
                    self.starts.append((name, self.now))
                case GiveUp():
                    self.over += 1

    @rule(name=st.sampled_from(["a", "b", ROUTER]))
    def dies(self, name):
        self.send(Died(name, self.state.lives[name].number, "died"))

    @rule(seconds=st.sampled_from([0.5, 2.0, 60.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.send(Tick())

    @rule(holds=st.booleans())
    def memory_changes_hands(self, holds):
        self.send(Hold(holds))

    @precondition(lambda self: self.todo)
    @rule(data=st.data())
    def something_is_done(self, data):
        effect = self.todo.pop(data.draw(st.integers(0, len(self.todo) - 1)))
        if isinstance(effect, Retire):
            if self.running.get(effect.name) == effect.number:
                del self.running[effect.name]
            self.send(Ended(effect.name, effect.number))
        else:
            self.send(Started(effect.name, effect.number))
            self.send(Rejoined(effect.name, effect.number, 1))

    @invariant()
    def budgets_hold(self):
        assert self.over <= 1
        for name in self.state.lives:
            times = [at for who, at in self.starts if who == name]
            for at in times:
                assert sum(at - POLICY.window_s < other <= at for other in times) <= POLICY.max_restarts

    @invariant()
    def what_is_down_comes_back(self):
        for name, life in self.state.lives.items():
            if life.stage in (Stage.ENDING, Stage.STARTING):
                assert any(effect.name == name for effect in self.todo), f"nobody works on {name}"
            if life.stage is Stage.BACKOFF and not self.state.reason and (name == ROUTER or not self.state.holds):
                assert wake_at(self.state) <= life.start_at


TestWorld = World.TestCase
