r"""The ``math`` reward: 1 if the last ``\boxed`` of a response holds the label's answer, else 0. And its parts.

Functions that are not ``async`` wait for algebra, which is done by grader processes within a deadline.
"""

from __future__ import annotations

from miles.rollout.rm_hub.grader_pool import grader_pool
from miles.rollout.rm_hub.math_compare import quick_verdict
from miles.rollout.rm_hub.math_text import expected_answer, last_boxed, same_text


def extract_answer(passage: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` of a text; None if there is none, or its braces do not close."""
    return last_boxed(passage) if "\\boxed" in passage else None


def grade_answer_mathd(given_answer: str, ground_truth: str) -> bool:
    """Whether two answers are the same text in the MATH benchmark's form."""
    return same_text(given_answer, ground_truth)


def grade_answer_sympy(given_answer: str, ground_truth: str) -> bool:
    """Whether two answers are equal by the rules of ``math_compare``."""
    quick = quick_verdict(given_answer, ground_truth)
    return grader_pool().equal_now(given_answer, ground_truth) if quick is None else quick


def grade_answer_verl(solution_str: str, ground_truth: object) -> bool:
    """The ``math`` reward as a truth value."""
    pair = answers_of(solution_str, ground_truth)
    return pair is not None and (grade_answer_mathd(*pair) or grade_answer_sympy(*pair))


def answers_of(response: str, label: object) -> tuple[str, str] | None:
    """The two answers that are to be compared; None if one is missing. A label may have its answer in a box."""
    if not label:
        return None
    expected, given = expected_answer(str(label)), extract_answer(response)
    return None if given is None or expected is None else (given, expected)


async def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are equal, as text or by algebra."""
    if grade_answer_mathd(given, expected):
        return True
    quick = quick_verdict(given, expected)
    return await grader_pool().equal(given, expected) if quick is None else quick


async def math_reward(response: str, label: object) -> int:
    """1 or 0."""
    pair = answers_of(response, label)
    return int(pair is not None and await same_answer(*pair))
