r"""The ``math`` reward: 1 if the last ``\boxed`` of a response holds the label's answer, else 0."""

from __future__ import annotations

from miles.rollout.rm_hub.grader_pool import grader_pool
from miles.rollout.rm_hub.math_compare import equal_by_algebra, quick_verdict
from miles.rollout.rm_hub.math_text import expected_answer, last_boxed, same_text


def quick_grade(response: str, label: object) -> bool | None:
    """The verdict where text and plain numbers decide; None if it takes algebra."""
    if label is None or label == "":
        return False
    expected = expected_answer(str(label))
    given = last_boxed(response)
    if given is None or expected is None:
        return False
    return True if same_text(given, expected) else quick_verdict(given, expected)


def grade_answer_verl(response: str, label: object) -> bool:
    """The verdict, with algebra in this process: it may take very long. For scripts; rollouts use ``math_reward``."""
    quick = quick_grade(response, label)
    if quick is not None:
        return quick
    return equal_by_algebra(last_boxed(response) or "", expected_answer(str(label)) or "")


async def math_reward(response: str, label: object) -> int:
    """1 or 0; algebra runs in grader processes, with a deadline."""
    quick = quick_grade(response, label)
    if quick is None:
        quick = await grader_pool().equal(last_boxed(response) or "", expected_answer(str(label)) or "")
    return int(quick)
