"""The life of a worker as a pure machine: each path by hand, then random events that never break the rules."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles_agents.agent.worker_life import (
    Dead,
    Exited,
    Greeted,
    Heard,
    Kill,
    Ready,
    Silent,
    Started,
    StopAsked,
    Tick,
    begin,
    step,
)

START_TIMEOUT_S = 30.0
BEAT_S = 1.0
SUSPECT_S = 5.0


class Run:
    """Feeds one life by hand."""

    def __init__(self):
        self.now = 100.0
        self.life = begin(self.now, start_timeout_s=START_TIMEOUT_S, beat_s=BEAT_S, suspect_s=SUSPECT_S)

    def send(self, event, after_s=0.0):
        self.now += after_s
        self.life, effects = step(self.life, event, self.now)
        return list(effects)


def up():
    run = Run()
    assert run.send(Started(7)) == []
    assert run.send(Greeted(), 1.0) == [Ready()]
    return run


def test_a_worker_is_ready_when_it_greets():
    run = up()
    assert (run.life.state, run.life.pid) == ("up", 7)


def test_a_worker_that_greets_before_its_start_is_reported_is_ready_all_the_same():
    run = Run()
    assert run.send(Greeted()) == [Ready()]
    assert run.send(Started(7)) == []
    assert (run.life.state, run.life.pid) == ("up", 7)


def test_a_worker_that_does_not_greet_in_time_is_killed_once():
    run = Run()
    run.send(Started(7))
    assert run.send(Tick("S"), START_TIMEOUT_S - 0.1) == []
    (kill,) = run.send(Tick("S"), 0.1)
    assert isinstance(kill, Kill)
    assert "did not say hello in time" in kill.why
    assert run.send(Tick("S"), 1000.0) == []
    (dead,) = run.send(Exited("killed"))
    assert dead == Dead(f"killed; it was ended because {kill.why}", expected=True, was_ready=False)


def test_a_stopped_process_is_reported_after_two_beats_and_a_mute_one_when_it_is_suspect():
    for state, patience_s in (
        ("T", 2 * BEAT_S),
        ("t", 2 * BEAT_S),
        ("S", SUSPECT_S),
        ("R", SUSPECT_S),
        (None, SUSPECT_S),
    ):
        run = up()
        assert run.send(Tick(state), patience_s - 0.01) == []
        (silent,) = run.send(Tick(state), 0.01)
        assert isinstance(silent, Silent)
        assert abs(silent.silence_s - patience_s) < 1e-6
        assert ("stopped" in silent.evidence) == (state in ("T", "t"))
        assert run.send(Tick(state), 1000.0) == []


def test_silence_ends_with_a_word_and_can_come_again():
    run = up()
    for _ in range(3):
        assert [type(effect) for effect in run.send(Tick("T"), 3.0)] == [Silent]
        assert run.send(Heard()) == [Heard()]
        assert run.send(Heard()) == []
        assert run.life.state == "up"


def test_a_reconnect_of_a_silent_worker_is_a_sign_of_life():
    run = up()
    run.send(Tick("T"), 3.0)
    assert run.send(Greeted()) == [Heard()]


def test_silence_alone_never_kills():
    run = up()
    for _ in range(1000):
        assert not any(isinstance(effect, Kill) for effect in run.send(Tick("T"), 60.0))


def fenced_after(*looks, timeout_s=10.0):
    """What each look (state, seconds after the one before) at a worker that may be stopped for so long came to."""
    run = up()
    run.life = replace(run.life, stopped_timeout_s=timeout_s)
    return run, [[type(effect) for effect in run.send(Tick(state), after_s)] for state, after_s in looks]


def test_a_process_that_every_look_finds_stopped_is_killed_and_nobody_asked_for_that():
    run, effects = fenced_after(("T", 1.0), *[("T", 2.5)] * 4, ("T", 1.0))
    assert effects == [[], [Silent], [], [], [Kill], []]
    (dead,) = run.send(Exited("killed by SIGKILL (9)"))
    cause = "killed by SIGKILL (9); it was ended because its process was stopped (SIGSTOP) for 10 s"
    assert dead == Dead(cause, expected=False, was_ready=True)


def test_a_stop_that_ends_or_is_a_debuggers_or_was_not_looked_at_is_not_enough():
    stopped = [("T", 4.0)] * 3
    for broken in (("S", 1.0), ("t", 1.0), ("T", SUSPECT_S + 0.1)):  # the last: the agent did not run
        _, effects = fenced_after(*stopped, broken, *stopped[:2])
        assert [Kill] not in effects, broken
    assert [Kill] not in fenced_after(*[("t", 1.0)] * 100)[1]
    assert [Kill] not in fenced_after(*[("T", 1.0)] * 100, timeout_s=None)[1]
    run, _ = fenced_after(*stopped)
    run.send(Heard())
    assert run.send(Tick("T"), 4.0)[-1:] != [Kill]
    assert run.life.state == "silent"


def test_a_silent_worker_is_told_of_again_when_it_is_stopped_and_when_it_is_not():
    run = up()
    evidence = [run.send(Tick(state), SUSPECT_S) for state in ("R", "S", "T", "T", "t", "S")]
    told = [[("SIGSTOP" in silent.evidence, "debugger" in silent.evidence) for silent in each] for each in evidence]
    assert told == [[(False, False)], [], [(True, False)], [], [(False, True)], [(False, False)]]


def test_a_death_that_nobody_asked_for_is_not_expected():
    assert up().send(Exited("exit code 1")) == [Dead("exit code 1", expected=False, was_ready=True)]


def test_a_death_before_the_hello_says_so():
    assert Run().send(Exited("exit code 1")) == [Dead("exit code 1", expected=False, was_ready=False)]


def test_a_death_that_was_asked_for_names_the_first_reason():
    run = up()
    assert run.send(StopAsked("the mesh is stopped")) == []
    assert run.send(StopAsked("the agent leaves")) == []
    (dead,) = run.send(Exited("exit code 0"))
    assert dead == Dead("exit code 0; it was ended because the mesh is stopped", expected=True, was_ready=True)


def test_a_worker_that_is_being_ended_is_not_called_silent_nor_ready():
    run = up()
    run.send(StopAsked("enough"))
    assert run.send(Tick("T"), 100.0) == []
    late = Run()
    late.send(StopAsked("enough"))
    assert late.send(Greeted()) == []
    assert late.life.state == "stopping"


def test_the_dead_stay_dead():
    run = up()
    run.send(Exited("exit code 1"))
    for event in (Started(8), Greeted(), Heard(), Tick("S"), StopAsked("x"), Exited("exit code 2")):
        assert run.send(event, 10.0) == []
        assert run.life.state == "dead"


class Worlds(RuleBasedStateMachine):
    """Any events in any order, judged by a memory of its own."""

    @initialize(stopped_timeout_s=st.none() | st.floats(1, 20))
    def set_up(self, stopped_timeout_s):
        self.now = 0.0
        self.stopped_timeout_s = stopped_timeout_s
        self.life = begin(
            self.now, start_timeout_s=START_TIMEOUT_S, beat_s=BEAT_S, suspect_s=SUSPECT_S,
            stopped_timeout_s=stopped_timeout_s,
        )  # fmt: skip
        self.effects = []
        self.ready = self.silent = self.stopping = self.fenced = self.dead = False
        self.heard_at = 0.0
        self.stopped_looks = []

    def send(self, event):
        self.life, effects = step(self.life, event, self.now)
        for effect in effects:
            self.judge(effect)
        self.effects += effects

    def judge(self, effect):
        assert not self.dead, "something was told of a dead worker"
        match effect:
            case Ready():
                assert not self.ready
                assert not self.stopping
                self.ready = True
            case Silent(silence_s):
                assert self.ready
                assert not self.silent or self.told_stop != self.looked
                assert not self.stopping
                self.told_stop = self.looked
                assert silence_s == self.now - self.heard_at >= min(2 * BEAT_S, SUSPECT_S)
                self.silent = True
            case Heard():
                assert self.silent
                self.silent = False
            case Kill():
                assert not self.stopping
                if self.ready:
                    self.fenced = True
                    assert self.now - self.stopped_looks[0] >= self.stopped_timeout_s
                else:
                    assert self.now >= START_TIMEOUT_S
                self.stopping = True
            case Dead(_, expected, was_ready):
                assert expected == (self.stopping and not self.fenced)
                assert was_ready == self.ready
                self.dead = True

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(pid=st.integers(1, 10))
    def started(self, pid):
        self.send(Started(pid))

    @rule()
    def greeted(self):
        self.heard_at, self.stopped_looks = self.now, []
        self.send(Greeted())

    @rule()
    def heard(self):
        self.heard_at, self.stopped_looks = self.now, []
        self.send(Heard())

    @rule(state=st.sampled_from(["S", "R", "D", "T", "t", "Z", None]))
    def tick(self, state):
        goes_on = state == "T" and self.stopped_looks and self.now - self.stopped_looks[-1] <= SUSPECT_S
        self.stopped_looks = [*(self.stopped_looks if goes_on else []), *([self.now] if state == "T" else [])]
        self.looked = state if state in ("T", "t") else ""
        self.send(Tick(state))

    @precondition(lambda self: not self.dead)
    @rule()
    def stop_asked(self):
        self.stopping = True
        self.send(StopAsked("asked"))

    @rule()
    def exited(self):
        was_dead = self.dead
        self.send(Exited("gone"))
        assert self.dead
        assert was_dead or isinstance(self.effects[-1], Dead)

    @invariant()
    def the_state_tells_what_was_told(self):
        state = self.life.state
        assert (state == "dead") == self.dead
        if not self.dead:
            assert (state == "stopping") == self.stopping
            if not self.stopping:
                assert (state == "silent") == self.silent
                assert (state in ("up", "silent")) == self.ready


TestWorlds = Worlds.TestCase
