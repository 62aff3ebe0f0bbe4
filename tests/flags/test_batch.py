"""The four-knob equation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.flags.batch import BatchSizes, solve

SMALL = st.integers(1, 64)
MAYBE = st.none() | SMALL


@pytest.mark.parametrize(
    ("given_knobs", "sizes"),
    [
        ((8, 4, None, None), (8, 4, 32, 1)),
        ((8, 4, None, 2), (8, 4, 16, 2)),
        ((8, 4, 16, None), (8, 4, 16, 2)),
        ((8, None, None, None), (8, 1, 8, 1)),
        ((None, 4, 32, None), (8, 4, 32, 1)),
        ((None, 4, 16, 2), (8, 4, 16, 2)),
        ((8, None, 16, 2), (8, 4, 16, 2)),
        ((8, None, 8, 1), (8, 1, 8, 1)),
    ],
)
def test_the_missing_side_is_computed(given_knobs, sizes):
    assert solve(*given_knobs) == BatchSizes(*sizes)


@pytest.mark.parametrize(
    ("given_knobs", "why"),
    [
        ((None, 4, None, 2), "neither"),
        ((8, 4, 16, 1), "8 prompts x 4 responses = 32 samples, but 16 samples x 1 steps = 16"),
        ((8, 4, 5, None), "no multiple"),
        ((8, 4, None, 3), "cannot be divided by 3"),
        ((None, 3, 16, 1), "cannot be divided by 3"),
        ((7, None, 16, 1), "no multiple"),
    ],
)
def test_what_cannot_be_is_told(given_knobs, why):
    assert why in solve(*given_knobs)


@given(MAYBE, MAYBE, MAYBE, MAYBE)
def test_a_solution_keeps_what_was_given_and_is_one(prompts, responses, samples, steps):
    knobs = (prompts, responses, samples, steps)
    sizes = solve(*knobs)
    if isinstance(sizes, str):
        assert sizes
        return
    found = (
        sizes.rollout_batch_size,
        sizes.n_samples_per_prompt,
        sizes.global_batch_size,
        sizes.num_steps_per_rollout,
    )
    assert all(value >= 1 for value in found)
    assert found[0] * found[1] == found[2] * found[3]
    assert [f for f, k in zip(found, knobs, strict=True) if k is not None] == [k for k in knobs if k is not None]


@given(SMALL, SMALL, SMALL, st.sampled_from(range(4)))
def test_one_that_is_left_out_comes_back(prompts, responses, steps, hidden):
    """Whatever is left out of a solution is found again, unless a default stands in for it."""
    samples = prompts * responses
    knobs = [prompts, responses, samples, 1] if hidden == 3 else [prompts * steps, responses, samples, steps]
    whole = tuple(knobs)
    knobs[hidden] = None
    assert solve(*knobs) == BatchSizes(*whole)


@given(MAYBE, MAYBE, MAYBE, MAYBE)
def test_no_solution_is_told_only_if_there_is_none_with_the_defaults(prompts, responses, samples, steps):
    if not isinstance(solve(prompts, responses, samples, steps), str) or (prompts is None and samples is None):
        return
    n, s = responses or 1, steps or 1
    if prompts is not None and samples is not None:
        assert prompts * n != samples * s
    elif prompts is None:
        assert samples * s % n
    else:
        assert prompts * n % s


@pytest.mark.parametrize(
    ("given_knobs", "steps"), [((4, 4, 6, None), 3), ((4, 4, 6, 3), 3), ((4, 4, 8, None), 2), ((4, 4, 20, None), 1)]
)
def test_a_last_step_may_be_smaller(given_knobs, steps):
    assert solve(*given_knobs, rounds_up=True) == BatchSizes(4, 4, given_knobs[2], steps)
    assert isinstance(solve(4, 4, 6, 2, rounds_up=True), str)
    assert isinstance(solve(4, 4, 6, 3), str)
