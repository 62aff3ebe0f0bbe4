"""The rewards ``deepscaler`` and ``gemma_math``: as ``math``, of what comes after the model's thoughts."""

from __future__ import annotations

from collections.abc import Callable

from miles.rollout.rm_hub.math_text import expected_answer
from miles.rollout.rm_hub.math_utils import extract_answer, grade_answer_mathd, grade_answer_sympy, same_answer

THOUGHTS_END = "</think>"
SOLUTION_BEGINS = "###Response"
GEMMA_THOUGHTS_END = "<channel|>"


def deepscaler_solution(response: str) -> str | None:
    """The response after its thoughts; None if nothing says where they end."""
    if THOUGHTS_END in response:
        return response.rpartition(THOUGHTS_END)[2]
    parts = response.split(SOLUTION_BEGINS)
    return parts[1] if len(parts) > 1 else None


def gemma_solution(response: str) -> str:
    """The response after its thoughts, or all of it."""
    return response.rpartition(GEMMA_THOUGHTS_END)[2]


def get_deepscaler_rule_based_reward(response: str, label: object) -> int:
    """1 or 0. Waits for algebra.

    Raises:
        ValueError: The label is neither text nor a number.
    """
    return _now(deepscaler_solution, response, label)


def get_gemma_math_rule_based_reward(response: str, label: object) -> int:
    """1 or 0. Waits for algebra.

    Raises:
        ValueError: The label is neither text nor a number.
    """
    return _now(gemma_solution, response, label)


async def deepscaler_reward(response: str, label: object) -> int:
    """``get_deepscaler_rule_based_reward`` for a loop."""
    pair = _pair(deepscaler_solution, response, label)
    return int(pair is not None and await same_answer(*pair))


async def gemma_math_reward(response: str, label: object) -> int:
    """``get_gemma_math_rule_based_reward`` for a loop."""
    pair = _pair(gemma_solution, response, label)
    return int(pair is not None and await same_answer(*pair))


def _now(solution_of: Callable[[str], str | None], response: str, label: object) -> int:
    pair = _pair(solution_of, response, label)
    return int(pair is not None and (grade_answer_mathd(*pair) or grade_answer_sympy(*pair)))


def _pair(solution_of: Callable[[str], str | None], response: str, label: object) -> tuple[str, str] | None:
    """The given answer and the expected one; None if one is missing."""
    if not isinstance(label, str | int | float):
        raise ValueError("it has to be text or a number")  # noqa: TRY004 - a value of the data, not of the program
    given = extract_answer(solution_of(response) or "")
    expected = expected_answer(str(label)) if label != "" else None
    return None if given is None or expected is None else (given, expected)
