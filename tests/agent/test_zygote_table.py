"""The decisions about zygotes, without any process."""

from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles_agents.agent.zygote_profile import Profile, is_late, profile_environment
from miles_agents.agent.zygote_table import Limits, No, Use, ZygoteTable

LIMITS = Limits(most=2, idle_s=100.0, rest_s=60.0)


def profile(name="torch", **env):
    return Profile("/usr/bin/python", Path("/tmp"), profile_environment(env), (name,))


def used(table, which, now=0.0):
    """A worker came from a zygote of the profile."""
    answer = table.ask(which, now)
    assert isinstance(answer, Use)
    table.ready(which, answer.life)
    table.leave(which, answer.life, now, made=True)
    return answer


def test_what_is_read_once_makes_another_profile_and_what_differs_by_rank_does_not():
    base = {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
    late = {
        "RANK": "3",
        "MASTER_ADDR": "n0",
        "MILES_RUN": "r:7",
        "NCCL_DEBUG": "INFO",
        "HTTPS_PROXY": "x",
        "no_proxy": "",
    }
    assert all(map(is_late, late))
    assert profile(**base) == profile(**base, **late)
    for name in ("LD_PRELOAD", "PYTHONHASHSEED", "PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TZ", "MINE"):
        assert not is_late(name)
        assert profile(**base) != profile(**{**base, name: "other"})


def test_the_name_of_a_profile_tells_profiles_apart_and_no_secrets():
    first, second = profile(TOKEN="hunter2"), profile(TOKEN="hunter3")
    assert first.name != second.name
    assert first.name.startswith("torch-") and "hunter2" not in first.name


def test_the_first_who_asks_has_it_started_and_all_share_it():
    table = ZygoteTable(LIMITS)
    first = table.ask(profile(), 0.0)
    assert first == Use(1, start=True)
    assert table.ask(profile(), 0.0) == Use(1)
    assert table.living[profile()].users == 2


def test_the_one_that_was_idle_longest_makes_room():
    table = ZygoteTable(LIMITS)
    used(table, profile("a"), 0.0)
    used(table, profile("b"), 1.0)
    answer = table.ask(profile("c"), 2.0)
    assert answer.start and answer.end == (profile("a"),)
    assert set(table.living) == {profile("b"), profile("c")}


def test_one_in_use_or_kept_makes_no_room():
    table = ZygoteTable(LIMITS)
    table.ask(profile("a"), 0.0)
    kept = table.ask(profile("b"), 0.0, keep=True)
    table.leave(profile("b"), kept.life, 0.0, made=False)
    answer = table.ask(profile("c"), 0.0)
    assert isinstance(answer, No) and "all 2 zygotes" in answer.why
    assert table.idle(1e9) == []


def test_an_idle_one_ends():
    table = ZygoteTable(LIMITS)
    used(table, profile(), 0.0)
    assert table.idle(99.0) == []
    assert table.idle(100.0) == [profile()]
    assert table.living == {}


def test_a_refusal_is_for_good():
    table = ZygoteTable(LIMITS)
    answer = table.ask(profile(), 0.0)
    assert table.refused(profile(), answer.life, "2 threads")
    assert not table.refused(profile(), answer.life, "2 threads")
    assert table.ask(profile(), 1e9) == No("2 threads")


def test_one_failure_is_forgiven_two_in_a_row_rest():
    table = ZygoteTable(LIMITS)
    assert table.failed(profile(), table.ask(profile(), 0.0).life, "killed", 0.0)
    again = table.ask(profile(), 1.0)
    assert again == Use(2, start=True)
    assert not table.failed(profile(), 1, "old news", 1.0)
    assert table.failed(profile(), again.life, "killed again", 1.0)
    assert table.ask(profile(), 60.9) == No("killed again")
    assert table.ask(profile(), 61.0) == Use(3, start=True)


def test_a_worker_that_was_made_wipes_out_failures():
    table = ZygoteTable(LIMITS)
    for now in (0.0, 1.0, 2.0, 3.0):
        answer = used(table, profile(), now)
        assert table.failed(profile(), answer.life, "killed", now)


def test_failures_far_apart_are_not_in_a_row():
    table = ZygoteTable(LIMITS)
    for now in (0.0, 61.0, 122.0):
        assert table.failed(profile(), table.ask(profile(), now).life, "killed", now)


def kept(table, now=0.0):
    answer = table.ask(profile(), now, keep=True)
    table.leave(profile(), answer.life, now, made=False)
    return answer.life


def test_a_kept_one_that_fails_is_lacking_until_it_lives_again_and_is_kept_then():
    table = ZygoteTable(LIMITS)
    assert table.failed(profile(), kept(table), "killed", 10.0)
    assert table.lacking(10.0) == [profile()]
    used(table, profile(), 20.0)  # whoever asks next, it is kept
    assert table.lacking(20.0) == [] and table.idle(1e9) == []


def test_a_kept_one_that_fails_twice_rests_and_one_that_is_refused_or_ended_is_kept_no_more():
    table = ZygoteTable(LIMITS)
    for now in (0.0, 1.0):
        assert table.failed(profile(), kept(table, now), "killed", now)
    assert table.lacking(60.9) == [] and table.lacking(61.0) == [profile()] and table.keeps
    table.refused(profile(), kept(table, 61.0), "threads")
    assert not table.keeps
    kept(other := ZygoteTable(LIMITS))
    other.ended(profile())
    assert other.lacking(1e9) == [] and not other.keeps


PROFILES = [profile(name) for name in "abcd"]


class Zygotes(RuleBasedStateMachine):
    """Whatever is asked and whatever happens: the bounds hold, and users are counted right."""

    def __init__(self):
        super().__init__()
        self.table = ZygoteTable(LIMITS)
        self.now = 0.0
        self.users = []

    @rule(which=st.sampled_from(PROFILES), keep=st.booleans())
    def ask(self, which, keep):
        before = self.table.living
        answer = self.table.ask(which, self.now, keep=keep)
        if isinstance(answer, No):
            assert which not in before
            return
        assert answer.start == (which not in before)
        assert all(not before[other].users and not before[other].kept for other in answer.end)
        self.users.append((which, answer.life))

    @precondition(lambda self: self.users)
    @rule(data=st.data(), made=st.booleans())
    def leave(self, data, made):
        user = data.draw(st.sampled_from(self.users))
        self.users.remove(user)
        self.table.leave(*user, self.now, made=made)

    @precondition(lambda self: self.users)
    @rule(data=st.data(), how=st.sampled_from(["ready", "failed", "refused"]))
    def news(self, data, how):
        which, life = data.draw(st.sampled_from(self.users))
        if how == "ready":
            self.table.ready(which, life)
        elif how == "failed":
            self.table.failed(which, life, "killed", self.now)
            assert which not in self.table.living or self.table.living[which].life != life
        elif which.name.startswith("d"):
            self.table.refused(which, life, "threads")

    @rule(seconds=st.floats(0, 150))
    def wait(self, seconds):
        self.now += seconds
        for ended in self.table.idle(self.now):
            assert not [user for user in self.users if user[0] == ended and self.is_current(user)]

    def is_current(self, user):
        record = self.table.living.get(user[0])
        return record is not None and record.life == user[1]

    @invariant()
    def bounds_hold(self):
        living = self.table.living
        assert len(living) <= LIMITS.most
        for which, record in living.items():
            assert record.users == len([user for user in self.users if user == (which, record.life)])
            assert self.table.why_not(which, self.now) == ""


TestZygotes = Zygotes.TestCase
TestZygotes.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
