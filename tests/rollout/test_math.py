r"""The ``math`` reward: what counts as the same answer, and graders that hang or die."""

import os
import signal

import pytest
from support.procs import eventually

from miles.rollout.rm_hub.grader_pool import GraderPool
from miles.rollout.rm_hub.math_text import last_boxed, normalise
from miles.rollout.rm_hub.math_utils import grade_answer_verl, quick_grade

BOX = "so the answer is \\boxed{%s}."

CASES = [
    # response's answer, label, right?
    ("4", "4", True),
    ("5", "4", False),
    ("04", "4", True),
    ("4.0", "4", True),
    ("4.", "4", True),
    ("-7", "-7", True),
    ("7", "-7", False),
    ("1,234", "1234", True),
    ("1,234,567", "1234567", True),
    ("12,34", "1234", False),
    ("0.5", "\\frac{1}{2}", True),
    (".5", "0.5", True),
    ("\\frac12", "\\frac{1}{2}", True),
    ("\\dfrac{1}{2}", "1/2", True),
    ("\\frac{2}{4}", "\\frac{1}{2}", False),  # unreduced
    ("0.333", "\\frac{1}{3}", False),
    ("x = 5", "5", True),
    ("5 \\text{ cm}", "5", True),
    ("5\\text{ cm}^2", "5", True),
    ("30^\\circ", "30", True),
    ("50\\%", "50", True),
    ("\\$3", "3", True),
    ("\\text{(A)}", "(A)", True),
    ("\\text{Tuesday}", "Tuesday", True),
    ("\\sqrt3", "\\sqrt{3}", True),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("\\sqrt{2}", "1.414", False),
    ("(1, 2)", "(1,2)", True),
    ("(2,1)", "(1,2)", False),
    ("[1,2)", "(1,2)", False),
    ("(1,2,3)", "(1,2)", False),
    ("(\\frac{1}{2}, 3)", "(1/2,3)", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+2", "(x+1)^2", False),
    ("3x", "x*3", True),
    ("\\pi/2", "\\frac{\\pi}{2}", True),
    ("a+b+c", "c+b+a", False),  # three unknowns: not compared
    ("2^{10}", "1024", False),  # an integer must be an integer
    ("", "4", False),
    ("4", "", False),
    ("\\left(1,2\\right)", "(1,2)", True),
    ("4", "\\boxed{4}", True),
    ("import os", "4", False),
    ("__import__('os')", "x", False),
]


@pytest.mark.parametrize(("given", "label", "right"), CASES)
def test_answers(given, label, right):
    assert grade_answer_verl(BOX % given, label) is right


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no box", None),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{never closed", None),
        ("\\boxed 7$ is it", "7"),
        ("\\boxed{}", ""),
    ],
)
def test_the_last_box_counts(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize("label", [None, "", 4, 4.0, "4", "\\boxed{4}"])
def test_labels_of_other_kinds(label):
    assert quick_grade(BOX % "4", label) is (label not in (None, ""))


def test_numbers_are_decided_without_algebra():
    assert quick_grade(BOX % "17", "18") is False
    assert quick_grade(BOX % "18", "18") is True
    assert quick_grade("18", "18") is False  # no box
    assert quick_grade(BOX % "2\\sqrt{3}", "\\sqrt{12}") is None


def test_normalising_twice_changes_nothing_more():
    for given, label, _ in CASES:
        for text in (given, label):
            assert normalise(normalise(text)) == normalise(text)


@pytest.mark.full
async def test_a_grader_that_hangs_or_is_killed_costs_itself_only():
    pool = GraderPool(size=1, deadline_s=20.0)
    try:
        assert await pool.equal("2\\sqrt{3}", "\\sqrt{12}")
        [pid] = pool.pids()
        os.kill(pid, signal.SIGKILL)
        assert not await pool.equal("2\\sqrt{3}", "\\sqrt{12}")  # the answer that was lost counts as wrong
        assert await pool.equal("2\\sqrt{3}", "\\sqrt{12}")
        [pid] = pool.pids()
        pool.deadline_s = 0.3
        os.kill(pid, signal.SIGSTOP)
        assert not await pool.equal("x+1", "1+x")
        assert pool.num_lost == 2
        await eventually(lambda: not os.path.exists(f"/proc/{pid}"))
        pool.deadline_s = 20.0
        assert await pool.equal("x+1", "1+x")
    finally:
        pool.close()
