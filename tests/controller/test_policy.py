"""Supervision: restarts and their budget, groups, hangs, and that everything is decided once."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles_controller.policy import (
    FailMesh,
    InvalidPolicy,
    KillRank,
    Policy,
    RankDied,
    RankFrozen,
    RankStarted,
    RankThawed,
    ReportHung,
    RespawnFailed,
    RespawnRank,
    Supervision,
    Tick,
    step,
)


def run(state, *timed):
    effects = []
    for now, event in timed:
        state, more = step(state, event, now)
        effects += more
    return state, effects


def mesh(policy, ranks=2):
    return Supervision.start(policy, {rank: 10 + rank for rank in range(ranks)})


def test_fail_fails_at_the_first_death_and_says_nothing_more():
    _, effects = run(mesh(Policy()), (1.0, RankDied(0, 10, "signal 9")), (2.0, RankDied(1, 11, "signal 9")))
    assert effects == [FailMesh("rank 0 (incarnation 10): signal 9", ("rank 0 (incarnation 10): signal 9",))]


def test_a_death_that_is_not_current_changes_nothing():
    state = mesh(Policy())
    assert run(state, (1.0, RankDied(0, 9, "old")), (1.0, RankDied(7, 10, "unknown"))) == (state, [])


def test_a_rank_is_restarted_alone_with_growing_backoff_until_its_budget_is_used_up():
    state = mesh(Policy("restart", max_restarts=2))
    state, effects = run(state, (1.0, RankDied(0, 10, "x")), (1.0, RankDied(0, 10, "again")))
    assert effects == [RespawnRank(0, 2.0)]
    state, effects = run(state, (3.0, RankStarted(0, 20)), (4.0, RankDied(0, 20, "y")))
    assert effects == [RespawnRank(0, 6.0)]
    # The other rank has a budget of its own.
    state, effects = run(state, (5.0, RankDied(1, 11, "z")))
    assert effects == [RespawnRank(1, 6.0)]
    _, (fail,) = run(state, (6.0, RespawnFailed(0, "no port")))
    assert fail.reason.startswith("2 restarts within 600 s are used up")
    assert [cause.split(": ", 1)[1] for cause in fail.causes] == ["x", "y", "z", "respawn failed: no port"]


def test_restarts_outside_of_the_window_do_not_count():
    state = mesh(Policy("restart", max_restarts=1, window_s=100.0))
    state, _ = run(state, (0.0, RankDied(0, 10, "x")), (1.0, RankStarted(0, 20)))
    assert run(state, (100.0, RankDied(0, 20, "y")))[1] == [RespawnRank(0, 101.0)]
    assert isinstance(run(state, (99.9, RankDied(0, 20, "y")))[1][0], FailMesh)


def test_backoff_is_capped():
    assert [Policy("restart").backoff(count) for count in (0, 1, 4, 5, 5000)] == [1.0, 2.0, 16.0, 30.0, 30.0]


def test_kill_group_kills_the_survivors_and_fails_when_all_are_dead():
    state, effects = run(mesh(Policy("kill_group"), 3), (1.0, RankDied(1, 11, "signal 11")))
    assert [(kill.rank, kill.incarnation) for kill in effects] == [(0, 10), (2, 12)]
    assert all("rank 1 (incarnation 11): signal 11" in kill.reason for kill in effects)
    state, effects = run(state, (2.0, RankDied(0, 10, "signal 9")))
    assert effects == []
    _, effects = run(state, (2.0, RankDied(2, 12, "signal 9")))
    first = "rank 1 (incarnation 11): signal 11"
    assert effects == [FailMesh(f"first to die: {first}", (first,))]


def test_a_whole_group_comes_back_together_and_has_one_budget():
    state = mesh(Policy("restart", whole_group=True, max_restarts=1))
    state, effects = run(state, (1.0, RankDied(0, 10, "x")), (3.0, RankDied(1, 11, "signal 9")))
    assert [type(effect) for effect in effects] == [KillRank, RespawnRank, RespawnRank]
    assert effects[1:] == [RespawnRank(0, 4.0), RespawnRank(1, 4.0)]
    # Rank 1 is still on its way when rank 0 dies again: it is killed as it arrives.
    state, effects = run(state, (5.0, RankStarted(0, 20)), (6.0, RankDied(0, 20, "y")))
    assert effects == []
    state, effects = run(state, (7.0, RankStarted(1, 21)))
    assert [(type(effect), effect.rank, effect.incarnation) for effect in effects] == [(KillRank, 1, 21)]
    _, (fail,) = run(state, (8.0, RankDied(1, 21, "signal 9")))
    assert (type(fail), len(fail.causes)) == (FailMesh, 2)


def test_a_rank_that_arrives_after_the_failure_is_killed():
    state = mesh(Policy(lambda death: "restart" if death.rank == 0 else "fail"))
    state, effects = run(state, (1.0, RankDied(0, 10, "x")), (2.0, RankDied(1, 11, "y")))
    assert [type(effect) for effect in effects] == [RespawnRank, FailMesh]
    _, effects = run(state, (3.0, RankStarted(0, 20)))
    assert [(type(effect), effect.incarnation) for effect in effects] == [(KillRank, 20)]


def test_a_function_sees_the_death_and_decides():
    seen = []

    def decide(death):
        seen.append(death)
        return "handled"

    state, effects = run(mesh(Policy(decide)), (1.0, RankDied(0, 10, "x")), (2.0, RankDied(1, 11, "y")))
    assert (effects, state.phase) == ([], "running")
    assert [(death.rank, death.incarnation, death.cause, death.now) for death in seen] == [
        (0, 10, "x", 1.0),
        (1, 11, "y", 2.0),
    ]
    assert seen[1].causes == ("rank 0 (incarnation 10): x",)


@pytest.mark.parametrize("answer", ["nonsense", None])
def test_a_function_that_answers_nonsense_fails_the_mesh(answer):
    _, (fail,) = run(mesh(Policy(lambda death: answer)), (1.0, RankDied(0, 10, "x")))
    assert "policy function returned" in fail.reason


def test_a_function_that_raises_fails_the_mesh():
    _, (fail,) = run(mesh(Policy(lambda death: 1 / 0)), (1.0, RankDied(0, 10, "x")))
    assert "ZeroDivisionError" in fail.reason


def test_a_hang_is_reported_once_and_never_killed_without_a_timeout():
    state = mesh(Policy())
    assert state.next_tick() is None
    frozen = RankFrozen(0, 10, 5.0, "in all_reduce")
    _, effects = run(state, (20.0, frozen), (30.0, frozen), (1e6, Tick()), (1e6, RankThawed(0, 10)), (1e6, frozen))
    assert effects == [ReportHung(0, 10, 5.0, "in all_reduce")]


def test_a_hung_rank_is_killed_after_its_timeout_and_its_death_tells_why():
    state, effects = run(
        mesh(Policy("restart", hang_timeout_s=60.0)), (20.0, RankFrozen(0, 10, 5.0, "in all_reduce")), (64.9, Tick())
    )
    assert [type(effect) for effect in effects] == [ReportHung]
    assert state.next_tick() == 65.0
    state, effects = run(state, (65.0, Tick()), (70.0, Tick()))
    assert effects == [KillRank(0, 10, "hung: in all_reduce")]
    state, effects = run(state, (71.0, RankDied(0, 10, "signal 9")))
    assert effects == [RespawnRank(0, 72.0)]
    assert state.causes == ("rank 0 (incarnation 10): killed because it hung for 66.0 s (in all_reduce); signal 9",)


def test_a_thawed_rank_is_not_killed():
    state, _ = run(mesh(Policy(hang_timeout_s=60.0)), (20.0, RankFrozen(0, 10, 5.0, "?")), (30.0, RankThawed(0, 10)))
    assert (run(state, (99.0, Tick()))[1], state.next_tick()) == ([], None)


@pytest.mark.parametrize(
    "bad",
    [
        {"on_death": "explode"},
        {"whole_group": True},
        {"max_restarts": -1},
        {"window_s": 0.0},
        {"backoff_s": 31.0},
        {"hang_timeout_s": 0.0},
        {"stopped_timeout_s": 0.0},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(bad):
    with pytest.raises(InvalidPolicy, match=next(iter(bad))):
        Policy(**bad)


class Mesh(RuleBasedStateMachine):
    """A world that obeys: kills lead to deaths, respawns to starts. All in random order and repeated."""

    @initialize(
        on_death=st.sampled_from(["fail", "restart", "kill_group", "group", "mixed"]),
        max_restarts=st.integers(0, 3),
        hang_timeout_s=st.none() | st.just(8.0),
        choices=st.lists(st.sampled_from(["fail", "restart", "restart_group", "kill_group", "handled"]), min_size=1),
    )
    def start(self, on_death, max_restarts, hang_timeout_s, choices):
        answers = iter(choices * 50)
        rule_of = {"group": "restart", "mixed": lambda death: next(answers, "fail")}
        self.policy = Policy(
            rule_of.get(on_death, on_death),
            max_restarts=max_restarts,
            window_s=50.0,
            hang_timeout_s=hang_timeout_s,
            whole_group=on_death == "group",
        )
        self.alive = {rank: rank + 1 for rank in range(3)}
        self.next, self.now, self.ended = 4, 0.0, []
        self.killed, self.reported, self.respawning, self.failed = set(), set(), set(), False
        self.state = Supervision.start(self.policy, dict(self.alive))

    def play(self, event):
        self.state, effects = step(self.state, event, self.now)
        for effect in effects:
            match effect:
                case KillRank(rank, incarnation):
                    assert self.alive[rank] == incarnation
                    assert incarnation not in self.killed
                    assert not self.failed or isinstance(event, RankStarted)
                    self.killed.add(incarnation)
                case RespawnRank(rank, at):
                    assert not self.failed
                    assert rank not in self.alive
                    assert rank not in self.respawning
                    assert 0 <= at - self.now <= self.policy.backoff_cap_s
                    self.respawning.add(rank)
                case FailMesh(reason, causes):
                    assert not self.failed
                    assert reason
                    assert causes
                    self.failed = True
                    if self.policy.on_death == "kill_group":
                        assert not self.alive
                case ReportHung(_, incarnation):
                    assert incarnation not in self.reported
                    self.reported.add(incarnation)
        return effects

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def die(self, data):
        rank = data.draw(st.sampled_from(sorted(self.alive)))
        event = RankDied(rank, self.alive.pop(rank), "signal 9")
        self.ended.append(event)
        self.play(event)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def tell_again(self, data):
        assert self.play(data.draw(st.sampled_from(self.ended))) == ()

    @precondition(lambda self: self.respawning)
    @rule(data=st.data(), works=st.booleans())
    def respawn(self, data, works):
        rank = data.draw(st.sampled_from(sorted(self.respawning)))
        self.respawning.remove(rank)
        if works:
            self.alive[rank], self.next = self.next, self.next + 1
            self.play(RankStarted(rank, self.alive[rank]))
        else:
            self.play(RespawnFailed(rank, "no room"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), thaw=st.booleans())
    def freeze(self, data, thaw):
        rank = data.draw(st.sampled_from(sorted(self.alive)))
        self.play(RankFrozen(rank, self.alive[rank], self.now, "stack"))
        if thaw:
            self.play(RankThawed(rank, self.alive[rank]))

    @rule(seconds=st.integers(1, 20))
    def wait(self, seconds):
        self.now += seconds
        self.play(Tick())

    @invariant()
    def the_state_knows_who_lives_and_nobody_waits_for_nothing(self):
        lives = {rank: life.incarnation for rank, life in self.state.ranks.items() if life.status in ("alive", "dying")}
        assert lives == self.alive
        assert {rank for rank, life in self.state.ranks.items() if life.status == "restarting"} == self.respawning
        assert self.failed == (self.state.phase == "failed")
        if self.state.phase in ("killing", "regrouping"):
            # Somebody's death, start or failure is still to come, and everybody who lives has been told to go.
            assert self.alive or self.respawning
            assert set(self.alive.values()) <= self.killed


TestMesh = Mesh.TestCase
TestMesh.settings = settings(max_examples=50)
