r"""Whatever a model writes: a reward is a number of its range, at once, and depends on nothing else."""

import time

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from miles.rollout.rm_hub import deterministic_random
from miles.rollout.rm_hub.deepscaler import _pair, deepscaler_solution, gemma_solution
from miles.rollout.rm_hub.f1 import f1_score, normalize_answer
from miles.rollout.rm_hub.gpqa import compute_gpqa_reward
from miles.rollout.rm_hub.math_compare import equal_by_algebra, plain_form, quick_verdict
from miles.rollout.rm_hub.math_dapo_utils import compute_score, normalize_final_answer
from miles.rollout.rm_hub.math_text import last_boxed, normalise, same_text
from miles.rollout.rm_hub.math_utils import answers_of
from miles.utils.types import Sample

PIECES = st.sampled_from([
    "\\boxed{", "}", "{", "\\frac", "\\sqrt", "\\text{", "^", "(", ")", "[", ",", "1", "23", "x", "y", "+", "-", "*",
    "/", "!", "\\", "\\\\", "$", "%", " ", "\n", "=", ".", "e5", "pi", "\\pi", "Answer:", "answer is", "B", "a",
    "the", "yes", "</think>", "<channel|>", "###Response", "_", "sqrt", "\u221a", "\u00b2", "\u00bd", "\u202e",
    "\u0663", "\x00", "'", '"', "option C",
])  # fmt: skip
TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))
LABELS = st.one_of(TEXT, st.none(), st.integers(), st.floats(), st.booleans(), st.lists(st.integers(), max_size=2))
MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def timely(function, *arguments):
    began = time.monotonic()
    value = function(*arguments)
    assert time.monotonic() - began < 5.0
    return value


@MANY
@given(TEXT, LABELS)
@example("\\boxed{\\frac}", "\\boxed{\\sqrt")
def test_answers_of_math(response, label):
    pair = timely(answers_of, response, label)
    if pair is not None:
        assert timely(same_text, *pair) in (True, False)
        assert timely(quick_verdict, *pair) in (True, False, None)


@MANY
@given(TEXT, TEXT)
def test_algebra_on_anything(one, other):
    verdict = timely(equal_by_algebra, one, other)
    assert isinstance(verdict, bool)
    quick = quick_verdict(one, other)
    assert quick is None or quick is verdict


@MANY
@given(TEXT)
def test_an_answer_equals_itself(text):
    assert same_text(text, text)
    if len(text) <= 1000:
        assert equal_by_algebra(text, text)


@MANY
@given(TEXT)
def test_what_is_in_a_box_is_found(text):
    if text.count("{") == text.count("}") == 0 and "\\boxed" not in text and "\\fbox" not in text:
        assert last_boxed(f"so \\boxed{{{text}}} it is") == text
    normalise(text)
    plain_form(text)


@MANY
@given(TEXT, LABELS)
def test_the_others_of_mathematics(response, label):
    for solution_of in (deepscaler_solution, gemma_solution):
        if isinstance(label, str | int | float):
            assert timely(_pair, solution_of, response, label) is None or True
    found = timely(compute_score, response, 4)
    assert found["score"] in (1.0, -1.0)
    assert (found["score"] == 1.0) is found["acc"]
    assert isinstance(found["pred"], str)
    strict = timely(compute_score, response, label, True)
    assert strict["score"] in (1.0, -1.0)
    normalize_final_answer(response)


@MANY
@given(TEXT, st.integers(-(10**12), 10**12))
def test_dapo_finds_the_answer_behind_anything(before, number):
    if "answer" not in before.lower():  # "Answer:" alone takes the next line
        assert compute_score(f"{before}\nAnswer: {number}", str(number))["score"] == 1.0


@MANY
@given(TEXT, TEXT)
def test_f1_is_symmetric_and_between_0_and_1(one, other):
    f1, precision, recall = timely(f1_score, one, other)
    assert f1_score(other, one) == (f1, recall, precision)
    assert all(0.0 <= value <= 1.0 for value in (f1, precision, recall))
    assert min(precision, recall) - 1e-12 <= f1 <= max(precision, recall) + 1e-12
    assert (f1 == 0.0) is (precision == 0.0) is (recall == 0.0)
    if normalize_answer(one):
        assert f1_score(one, one)[0] == 1.0
    assert (f1 == 1.0) is (sorted(normalize_answer(one).split()) == sorted(normalize_answer(other).split()) != [])


METADATA = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.one_of(
            st.lists(TEXT, max_size=4), st.dictionaries(st.sampled_from("ABCD"), TEXT), TEXT, st.none()
        ),
        "valid_letters": st.one_of(st.lists(st.sampled_from("ABCDxyz"), max_size=4), st.none(), st.just("ABC")),
        "correct_letter": st.one_of(st.sampled_from("ABCD z"), st.none(), st.integers()),
        "correct_answer": LABELS,
        "answer_text": LABELS,
    },
)


@MANY
@given(st.one_of(TEXT, st.none()), LABELS, st.one_of(METADATA, st.none()))
def test_gpqa_on_anything(response, label, metadata):
    assert timely(compute_gpqa_reward, response, label, metadata) in (0.0, 1.0)


@MANY
@given(st.text(st.characters(), max_size=30), st.lists(st.integers(), max_size=5))
def test_deterministic_random_on_anything(response, tokens):
    sample = Sample(tokens=tokens)
    assert deterministic_random(sample, response) == deterministic_random(sample, response) in (0, 1)
