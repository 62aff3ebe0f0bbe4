"""When a run evaluates and saves."""

from hypothesis import given
from hypothesis import strategies as st

from miles.training.schedule import Cadence, iterations


def ids(found, what):
    return [one.rollout_id for one in found if getattr(one, what)]


def test_saves_and_evaluates_by_their_intervals_and_at_the_end():
    found = list(iterations(Cadence(eval_interval=2, save_interval=3), start=0, num_rollout=8))
    assert ids(found, "save") == [2, 5, 7]
    assert ids(found, "evaluate_after") == [1, 3, 5, 7]
    assert ids(found, "evaluate_before") == [0]
    assert ids(found, "is_last") == [7]


def test_without_an_interval_only_the_last_is_saved_if_there_is_somewhere_to_save():
    assert ids(iterations(Cadence(saves_last=True), start=0, num_rollout=4), "save") == [3]
    assert ids(iterations(Cadence(), start=0, num_rollout=4), "save") == []


def test_the_end_of_an_epoch_saves_too():
    cadence = Cadence(save_interval=100, eval_interval=100, num_rollout_per_epoch=3)
    found = list(iterations(cadence, start=0, num_rollout=10))
    assert ids(found, "save") == [2, 5, 8, 9]
    assert ids(found, "evaluate_after") == [2, 5, 8, 9]


def test_a_resumed_run_evaluates_before_its_own_first_iteration():
    found = list(iterations(Cadence(eval_interval=5), start=3, num_rollout=6))
    assert [one.rollout_id for one in found] == [3, 4, 5]
    assert ids(found, "evaluate_before") == [3]


def test_the_evaluation_before_training_can_be_left_out():
    cadence = Cadence(eval_interval=5, eval_before_train=False)
    assert ids(iterations(cadence, start=0, num_rollout=6), "evaluate_before") == []


def test_stopping_early_does_not_make_an_iteration_the_last():
    found = list(iterations(Cadence(saves_last=True), start=2, num_rollout=10, stop_after=3))
    assert [one.rollout_id for one in found] == [2, 3, 4]
    assert ids(found, "is_last") == ids(found, "save") == []


@given(
    st.integers(1, 7), st.integers(1, 7), st.integers(0, 20), st.integers(0, 30), st.integers(0, 30),
)  # fmt: skip
def test_a_run_that_was_cut_anywhere_saves_and_evaluates_what_the_whole_one_does(save, evaluate, num, cut, per_epoch):
    cadence = Cadence(eval_interval=evaluate, save_interval=save, num_rollout_per_epoch=per_epoch or None)
    whole = list(iterations(cadence, start=0, num_rollout=num))
    parts = [
        *iterations(cadence, start=0, num_rollout=num, stop_after=cut),
        *iterations(cadence, start=min(cut, num), num_rollout=num),
    ]
    assert [one.rollout_id for one in parts] == list(range(num))
    for what in ("save", "evaluate_after", "is_last"):
        assert ids(parts, what) == ids(whole, what)
