"""The life of a service as a pure machine: each path by hand, then a random world that never breaks the rules."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles_agents.agent.service_life import (
    Exited,
    FenceAsked,
    GiveUp,
    Kill,
    LifeNumbers,
    PauseAsked,
    Phase,
    Probe,
    ProbeFailed,
    ProbeOk,
    Process,
    ReleaseAsked,
    ReleaseDone,
    Report,
    ResumeAsked,
    Start,
    Started,
    StartFailed,
    StopAsked,
    Tick,
    begin,
    step,
    wake_at,
)

NUMBERS = LifeNumbers(
    start_timeout_s=100,
    resume_timeout_s=50,
    release_timeout_s=40,
    probe_interval_s=2,
    probe_timeout_s=5,
    failures_until_unhealthy=3,
    max_restarts=2,
    restart_window_s=1000,
    backoff_s=1,
    max_backoff_s=1.5,
    grace_s=10,
    kill_again_s=15,
    max_port_retries=5,
)


class Run:
    """Feeds one life by hand. Returns effects without reports."""

    def __init__(self, numbers=NUMBERS):
        self.now = 0.0
        self.state, effects = begin(numbers, self.now)
        assert effects == [Start(1, new_ports=True)]

    def send(self, event):
        self.state, effects = step(self.state, event, self.now)
        return [effect for effect in effects if not isinstance(effect, Report)]

    def tick(self, now):
        self.now = now
        return self.send(Tick())

    def ready(self):
        self.send(Started(self.state.attempt, 100))
        assert self.tick(self.now) == [Probe(self.state.attempt)]
        self.send(ProbeOk(self.state.attempt))
        assert self.phase is Phase.READY
        return self

    def exit(self, text="exit code 1", **options):
        return self.send(Exited(self.state.attempt, text, **options))

    @property
    def phase(self):
        return self.state.phase


def test_it_is_ready_when_a_probe_is_answered_and_is_probed_on():
    run = Run().ready()
    assert wake_at(run.state) == 2
    assert run.tick(1.9) == []
    assert run.tick(2) == [Probe(1)]
    assert run.tick(3) == []
    assert [str(transition) for transition in run.state.story] == ["starting -> ready: the health probe was answered"]


def test_failing_probes_do_not_count_while_starting_but_the_deadline_does():
    run = Run()
    run.send(Started(1, 100))
    for number in range(20):
        assert run.tick(number * 2) == [Probe(1)]
        assert run.send(ProbeFailed(1, "connection refused")) == []
    assert run.phase is Phase.STARTING
    assert run.tick(100) == [Kill(1, 10)]
    assert run.phase is Phase.UNHEALTHY
    assert "not ready after 100 s; last probe: connection refused" in run.state.story[-1].cause


def test_three_failed_probes_in_a_row_make_it_unhealthy_and_it_is_killed_and_restarted():
    run = Run().ready()
    for now, event in [(2, ProbeFailed), (4, ProbeFailed), (6, None), (8, ProbeFailed), (10, ProbeFailed)]:
        assert run.tick(now) == [Probe(1)]
        assert run.send(ProbeOk(1) if event is None else event(1, "no answer")) == []
    assert run.tick(12) == [Probe(1)]
    assert run.send(ProbeFailed(1, "no answer")) == [Kill(1, 10)]
    assert run.exit("killed by SIGTERM") == []
    assert (run.phase, wake_at(run.state)) == (Phase.BACKOFF, 13)
    assert "3 health probes failed: no answer; then killed by SIGTERM" in run.state.story[-1].cause
    assert run.tick(13) == [Start(2, new_ports=False)]


def test_a_probe_whose_result_never_comes_counts_as_failed():
    run = Run().ready()
    assert run.tick(2) == [Probe(1)]
    assert run.tick(12) == []
    assert run.state.failures == 1
    assert run.send(ProbeOk(1)) == []
    assert run.state.failures == 1


def test_a_kill_that_shows_nothing_is_repeated_without_grace():
    run = Run().ready()
    assert run.send(StopAsked()) == [Kill(1, 10)]
    assert run.send(StopAsked()) == []
    assert run.tick(24) == []
    assert run.tick(25) == [Kill(1, 0)]
    assert run.tick(40) == [Kill(1, 0)]
    assert run.exit() == []
    assert (run.phase, wake_at(run.state)) == (Phase.DEAD, None)


def test_restarts_back_off_and_end_with_the_budget():
    run = Run().ready()
    run.exit()
    assert wake_at(run.state) == 1
    assert run.tick(1) == [Start(2, new_ports=False)]
    run.ready().exit()
    assert wake_at(run.state) == 2.5
    run.tick(2.5)
    run.ready()
    assert run.exit("killed by SIGSEGV") == [GiveUp("killed by SIGSEGV; 2 restarts in 1000 s are used up")]
    assert run.phase is Phase.DEAD


def test_restarts_long_ago_do_not_count():
    run = Run().ready()
    for _ in range(10):
        run.now += 600
        run.exit()
        assert run.phase is Phase.BACKOFF
        run.tick(wake_at(run.state))
        run.ready()


def test_a_port_in_use_before_ready_means_other_ports_and_costs_nothing_but_only_five_times():
    run = Run()
    for attempt in range(1, 6):
        run.send(Started(attempt, 100))
        assert run.exit(ports_in_use=True) == [Start(attempt + 1, new_ports=True)]
    assert run.state.restarts == ()
    run.send(Started(6, 100))
    assert run.exit(ports_in_use=True) == []
    assert (run.phase, len(run.state.restarts)) == (Phase.BACKOFF, 1)


def test_the_words_port_in_use_mean_nothing_once_it_was_ready():
    run = Run().ready()
    run.exit(ports_in_use=True)
    assert run.phase is Phase.BACKOFF


def test_a_start_that_fails_costs_a_restart():
    run = Run()
    run.send(StartFailed(1, "no such file"))
    assert run.phase is Phase.BACKOFF
    assert run.tick(1) == [Start(2, new_ports=False)]


def test_a_stop_while_it_is_being_started_kills_what_comes_of_it():
    run = Run()
    assert run.send(StopAsked()) == []
    assert run.phase is Phase.STOPPING
    assert run.send(Started(1, 100)) == [Kill(1, 10)]
    run.exit()
    assert run.phase is Phase.DEAD


def test_a_start_that_comes_too_late_is_killed():
    run = Run()
    assert run.tick(100) == []
    assert run.phase is Phase.UNHEALTHY
    assert run.send(Started(1, 100)) == [Kill(1, 10)]


def test_paused_is_not_probed_and_resumed_is_probed_at_once():
    run = Run().ready()
    run.send(PauseAsked())
    assert (run.phase, wake_at(run.state)) == (Phase.PAUSED, None)
    assert run.tick(1000) == []
    run.send(ResumeAsked())
    assert run.phase is Phase.READY
    assert run.tick(1000) == [Probe(1)]


def test_a_pause_asked_before_ready_holds_from_ready_on():
    run = Run()
    run.send(PauseAsked())
    run.send(Started(1, 100))
    run.tick(0)
    run.send(ProbeOk(1))
    assert run.phase is Phase.PAUSED
    assert [transition.after for transition in run.state.story] == [Phase.READY, Phase.PAUSED]


def test_release_and_resume_end_in_ready_by_a_probe():
    run = Run().ready()
    run.send(ReleaseAsked())
    assert (run.phase, wake_at(run.state)) == (Phase.PAUSED, 40)
    run.send(ReleaseDone())
    assert (run.phase, wake_at(run.state)) == (Phase.RELEASED, None)
    run.now = 500
    run.send(ResumeAsked())
    assert run.phase is Phase.RESUMING
    assert run.tick(500) == [Probe(1)]
    run.send(ProbeOk(1))
    assert run.phase is Phase.READY


def test_a_release_or_resume_that_does_not_end_makes_it_unhealthy():
    run = Run().ready()
    run.send(ReleaseAsked())
    assert run.tick(40) == [Kill(1, 10)]
    run = Run().ready()
    run.send(ReleaseDone())
    run.send(ResumeAsked())
    run.tick(0)
    assert run.tick(50) == [Kill(1, 10)]
    assert "not back after 50 s" in run.state.story[-1].cause


def test_a_death_while_released_is_seen_and_restarted():
    run = Run().ready()
    run.send(ReleaseDone())
    run.exit("killed by SIGKILL")
    assert run.phase is Phase.BACKOFF


def test_a_fenced_one_is_killed_without_grace_and_never_starts_again():
    run = Run().ready()
    assert run.send(FenceAsked("lease lost")) == [Kill(1, 0)]
    assert run.exit() == []
    assert (run.phase, wake_at(run.state)) == (Phase.FENCED, None)
    for event in (Tick(), ResumeAsked(), PauseAsked(), ReleaseAsked(), FenceAsked("again")):
        assert run.send(event) == []
    assert run.phase is Phase.FENCED
    run.send(StopAsked())
    assert run.phase is Phase.DEAD


def test_a_fence_while_stopping_takes_the_grace_away():
    run = Run().ready()
    run.send(StopAsked())
    assert run.send(FenceAsked("lease lost")) == [Kill(1, 0)]
    assert run.phase is Phase.STOPPING


def test_events_of_an_earlier_attempt_change_nothing():
    run = Run().ready()
    run.exit()
    run.tick(1)
    run.send(Started(2, 200))
    before = run.state
    for event in (Started(1, 1), StartFailed(1, ""), Exited(1, ""), ProbeOk(1), ProbeFailed(1, "")):
        assert run.send(event) == []
        assert run.state == before


def test_the_story_keeps_the_last_50_transitions():
    run = Run().ready()
    for _ in range(60):
        run.send(PauseAsked())
        run.send(ResumeAsked())
    assert len(run.state.story) == 50


WAITS_FOR_OWNER = (Phase.PAUSED, Phase.RELEASED, Phase.FENCED, Phase.DEAD)
UNPROBED = (Phase.PAUSED, Phase.RELEASED, Phase.FENCED, Phase.DEAD, Phase.STOPPING, Phase.BACKOFF, Phase.UNHEALTHY)


class AnyWorld(RuleBasedStateMachine):
    """A world that does with processes, probes and owners whatever it likes."""

    @initialize(port_retries=st.integers(0, 2), restarts=st.integers(0, 3))
    def start(self, port_retries, restarts):
        self.numbers = LifeNumbers(
            start_timeout_s=100, max_restarts=restarts, restart_window_s=1e9, max_port_retries=port_retries
        )
        self.now = 0.0
        self.spawning = None
        self.running = None
        self.kills = 0
        self.starts = 0
        self.stopped = False
        self.fenced = False
        self.state, effects = begin(self.numbers, self.now)
        self.check(effects)

    def send(self, event):
        before = self.state.phase
        self.state, effects = step(self.state, event, self.now)
        reports = [effect.transition for effect in effects if isinstance(effect, Report)]
        for transition in reports:
            assert transition.before is before
            before = transition.after
        assert self.state.phase is before
        assert self.state.story[-len(reports) :] == tuple(reports) or not reports
        self.check(effects)

    def check(self, effects):
        for effect in effects:
            match effect:
                case Start(attempt):
                    assert self.spawning is None
                    assert self.running is None
                    assert not self.stopped
                    assert not self.fenced
                    self.spawning = attempt
                    self.starts += 1
                case Probe(attempt):
                    assert attempt == self.running
                    assert self.state.phase not in UNPROBED
                case Kill(attempt, grace_s):
                    assert attempt == self.running
                    assert grace_s == 0 or not self.fenced
                    self.kills += 1
                case GiveUp():
                    assert self.state.phase is Phase.DEAD
                    assert len(self.state.restarts) == self.numbers.max_restarts

    @precondition(lambda self: self.spawning)
    @rule()
    def process_runs(self):
        self.running, self.spawning = self.spawning, None
        self.send(Started(self.running, 1000 + self.running))

    @precondition(lambda self: self.spawning)
    @rule()
    def process_does_not_come(self):
        attempt, self.spawning = self.spawning, None
        self.send(StartFailed(attempt, "no such file"))

    @precondition(lambda self: self.running)
    @rule(ports_in_use=st.booleans())
    def process_ends(self, ports_in_use):
        attempt, self.running = self.running, None
        self.send(Exited(attempt, "exit code 1", ports_in_use))

    @rule(ok=st.booleans(), age=st.integers(0, 1))
    def probe_ends(self, ok, age):
        attempt = self.state.attempt - age
        self.send(ProbeOk(attempt) if ok else ProbeFailed(attempt, "no answer"))

    @rule(event=st.sampled_from([PauseAsked(), ResumeAsked(), ReleaseAsked(), ReleaseDone()]))
    def owner_asks(self, event):
        self.send(event)

    @rule()
    def owner_stops(self):
        self.stopped = True
        self.send(StopAsked())

    @rule()
    def owner_fences(self):
        self.fenced = True
        self.send(FenceAsked("lease lost"))

    @rule(pause=st.floats(0, 30))
    def time_passes(self, pause):
        self.now += pause
        self.send(Tick())

    @rule()
    def next_deadline_comes(self):
        due = wake_at(self.state)
        if due is not None:
            self.now = max(self.now, due)
            before = self.state
            self.send(Tick())
            # A due tick always does something, or the shell would spin.
            assert self.state != before
            assert wake_at(self.state) is None or wake_at(self.state) > self.now or self.state.phase is not before.phase

    @invariant()
    def process_is_known(self):
        known = {Process.NONE: (None, None), Process.SPAWNING: (self.state.attempt, None)}
        expected = known.get(self.state.process, (None, self.state.attempt))
        assert (self.spawning, self.running) == expected

    @invariant()
    def every_wait_has_a_deadline_or_an_owner(self):
        assert wake_at(self.state) is not None or self.state.phase in WAITS_FOR_OWNER
        if self.running and self.state.phase in (Phase.FENCED, Phase.STOPPING, Phase.UNHEALTHY):
            assert self.kills
            assert wake_at(self.state) is not None

    @invariant()
    def restarts_stay_within_the_budget(self):
        assert len(self.state.restarts) <= self.numbers.max_restarts
        assert self.state.port_retries <= self.numbers.max_port_retries

    @invariant()
    def stopped_means_stopping_or_dead(self):
        if self.stopped:
            assert self.state.phase in (Phase.STOPPING, Phase.DEAD)

    def teardown(self):
        """From wherever it stands, a stop ends in dead."""
        if not hasattr(self, "state"):
            return
        self.owner_stops()
        if self.spawning:
            self.process_runs()
        if self.running:
            self.process_ends(ports_in_use=True)
        assert (self.state.phase, self.state.process) == (Phase.DEAD, Process.NONE)
        assert wake_at(self.state) is None


TestAnyWorld = AnyWorld.TestCase
TestAnyWorld.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_can_be_reached(phase):
    run = Run().ready()
    paths = {
        Phase.READY: [],
        Phase.PAUSED: [PauseAsked()],
        Phase.RELEASED: [ReleaseDone()],
        Phase.RESUMING: [ReleaseDone(), ResumeAsked()],
        Phase.UNHEALTHY: [Tick(), *[ProbeFailed(1, "x"), Tick()] * 3],
        Phase.BACKOFF: [Exited(1, "x")],
        Phase.STARTING: [Exited(1, "x"), Tick()],
        Phase.STOPPING: [StopAsked()],
        Phase.FENCED: [FenceAsked("x")],
        Phase.DEAD: [StopAsked(), Exited(1, "x")],
    }
    for event in paths[phase]:
        run.now += 5
        run.send(event)
    assert run.phase is phase


def test_a_service_that_is_ready_is_not_judged_before_its_first_wait_nor_after_each_resumption():
    numbers = replace(NUMBERS, first_wait_s=60, starting_interval_s=1, again_interval_s=0.5, probe_interval_s=30)
    run = Run(numbers)
    run.send(Started(1, 7))
    run.send(Tick())
    run.send(ProbeFailed(1, "not yet"))
    assert wake_at(run.state) == 1.0, "while it starts, it is asked often"
    run.now = 1.0
    assert run.send(Tick()) == [Probe(1)]
    run.send(ProbeOk(1))
    assert run.state.phase is Phase.READY and wake_at(run.state) == 61.0
    run.send(PauseAsked())
    run.now = 5.0
    run.send(ResumeAsked())
    assert wake_at(run.state) == 65.0
    run.now = 65.0
    assert run.send(Tick()) == [Probe(1)]
    run.send(ProbeFailed(1, "silent"))
    assert wake_at(run.state) == 65.5, "one that fails is repeated soon"
