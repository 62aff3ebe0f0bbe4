"""Decisions of a recovery: when a part is started again, from what, and when it is given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.training.recovery_plan import (
    Begin,
    Broke,
    Checkpoint,
    Died,
    GiveUp,
    Life,
    Rebuilt,
    RecoveryGivenUp,
    Wanted,
    is_checkpoint_due,
    judge_heartbeats,
    plan_replay,
    step,
)
from miles_controller import Policy

POLICY = Policy("restart", max_restarts=3, window_s=100.0, backoff_s=1.0, backoff_cap_s=30.0)
EVENTS = st.lists(st.tuples(st.sampled_from([Died("x"), Wanted(), Rebuilt(), Broke()]), st.floats(0, 30)), max_size=40)


def run(life, *events):
    """The life and the effects after events at the times that go with them."""
    effects = []
    for event, now in events:
        life, effect = step(life, event, now)
        effects.append(effect)
    return life, effects


def test_the_first_restart_comes_at_once_and_later_ones_wait_longer():
    life, effects = run(
        Life(POLICY), (Died("a"), 0.0), (Rebuilt(), 1.0), (Died("b"), 2.0), (Died("c"), 4.0), (Died("d"), 8.0)
    )
    assert effects == [Begin(0.0), None, Begin(3.0), Begin(6.0), GiveUp(("a", "b", "c", "d"))]
    assert life.phase == "lost"


def test_restarts_of_long_ago_do_not_count():
    life = Life(POLICY)
    for now in range(0, 2000, 50):
        life, effects = run(life, (Died(str(now)), float(now)), (Rebuilt(), now + 1.0))
        assert isinstance(effects[0], Begin)
    assert life.phase == "up"


def test_a_part_that_has_to_wait_for_its_turn_begins_when_it_is_wanted():
    _, effects = run(Life(POLICY, eager=False), (Died("a"), 0.0), (Wanted(), 70.0), (Wanted(), 71.0))
    assert effects == [None, Begin(70.0), None]


def test_what_is_no_death_is_not_tried_again():
    life, effects = run(Life(POLICY), (Died("a"), 0.0), (Broke(), 1.0), (Died("b"), 2.0), (Wanted(), 3.0))
    assert life.phase == "lost"
    assert effects == [Begin(0.0), None, None, None]


@given(st.booleans(), EVENTS)
def test_attempts_follow_each_other_within_the_budget(eager, events):
    life, now, begun = Life(POLICY, eager), 0.0, []
    for event, seconds in events:
        now += seconds
        before, (life, effect) = life, step(life, event, now)
        if isinstance(effect, Begin):
            assert before.phase != "lost"
            assert effect.at >= now
            assert before.phase == "rebuilding" or before.phase == "up" or isinstance(event, Wanted)
            begun.append(now)
        if isinstance(effect, GiveUp):
            assert len([at for at in begun if now - at < POLICY.window_s]) == POLICY.max_restarts
            assert effect.causes
        if before.phase == "lost":
            assert (life, effect) == (before, None)
        assert len([at for at in begun if now - at < POLICY.window_s]) <= POLICY.max_restarts


def checkpoint(rollout_id):
    return Checkpoint("/save", "/save_critic", rollout_id)


@given(st.integers(0, 5), st.integers(0, 20), st.integers(-1, 20), st.sets(st.integers(0, 30)))
def test_a_replay_is_all_that_was_trained_since_the_checkpoint_in_order(start, length, saved, kept):
    trained = start + length - 1
    newest = checkpoint(saved) if start <= saved <= trained else None
    first = start if newest is None else saved + 1
    needed = list(range(first, trained + 1))
    if not set(needed) <= kept:
        with pytest.raises(RecoveryGivenUp) as raised:
            plan_replay(newest, start=start, trained=trained, kept=kept)
        missing = [number for number in needed if number not in kept]
        assert str(missing) in raised.value.evidence
        return
    plan = plan_replay(newest, start=start, trained=trained, kept=kept)
    assert plan.checkpoint == newest
    assert list(plan.rollouts) == needed


def test_a_checkpoint_is_loaded_whole_whatever_the_run_began_with():
    began = {"finetune": True, "no_load_optim": True, "no_load_rng": True, "load": "/hf", "ckpt_step": None}
    flags = checkpoint(7).flags(began)
    assert flags == {
        "load": "/save", "ckpt_step": 7, "critic_load": "/save_critic", "critic_ckpt_step": 7, "finetune": False,
        "no_load_optim": False, "no_load_rng": False,
    }  # fmt: skip
    assert "no_load_optim" not in checkpoint(7).flags({**began, "debug_disable_optimizer": True})


@pytest.mark.parametrize(
    ("batches", "size", "due"), [(0, 10**9, False), (1, 10, False), (4, 10, True), (1, 1000, True), (3, 999, False)]
)
def test_the_journal_is_bounded_in_rollouts_and_bytes(batches, size, due):
    assert is_checkpoint_due(batches, size, max_batches=4, max_bytes=1000) is due


def test_only_heartbeats_left_out_in_a_row_are_a_hang():
    misses, hanging = {}, []
    for answers in ("10", "10", "11", "10", "10", "10"):
        answered = {rank: answer == "1" for rank, answer in enumerate(answers)}
        misses, found = judge_heartbeats(misses, answered, 3)
        hanging.append(found)
    assert hanging == [[], [], [], [], [], [1]]
