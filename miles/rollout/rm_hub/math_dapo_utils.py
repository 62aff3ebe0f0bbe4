r"""The ``dapo`` reward: 1.0 if the last ``Answer: ...`` of a response is the label's whole number, else -1.0.

Answers are compared as text after the normalisation of Lewkowycz et al. 2022, "Solving Quantitative Reasoning Problems
with Language Models" (Minerva), with the expressions that Yu et al. 2025, "DAPO", remove.
"""

from __future__ import annotations

import re
from typing import Any

from miles.rollout.rm_hub.math_text import last_boxed

TAIL, BOXED_TAIL = 300, 100
"""How many characters at the end of a response are looked at."""
MOST_LABEL = 400
NOT_FOUND = "[INVALID]"

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_WORDS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_PATTERNS = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)([^{])"), r"sqrt{\2}"),
)


def compute_score(
    solution_str: str,
    ground_truth: object,
    strict_box_verify: bool = False,
    pause_tokens_index: list[int] | None = None,
) -> dict[str, Any]:
    r"""The reward as ``{"score": 1.0 or -1.0, "acc": whether it is right, "pred": the answer that was found}``.

    Args:
        solution_str: The response; its last 300 characters count.
        ground_truth: A number, or text that is one after normalisation.
        strict_box_verify: What the last ``\boxed`` in the last 100 characters holds has to be the label, word for word.
        pause_tokens_index: Four positions, for ``strict_box_verify``: the box is looked for from 100 characters before
            the last of them.

    Raises:
        ValueError: The label is no number (not asked with ``strict_box_verify``).
    """
    tail = solution_str[-TAIL:]
    if strict_box_verify:
        score, pred = is_correct_strict_box(tail, str(ground_truth), pause_tokens_index)
        return {"score": float(score), "acc": score == 1, "pred": pred}
    correct, found = is_correct_minerva(tail, ground_truth)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": found}


def is_correct_minerva(solution_str: str, gt: object) -> tuple[bool, str]:
    """Whether the last ``Answer: ...`` of a text is the label, and what it is after normalisation.

    Raises:
        ValueError: The label is no number.
    """
    expected = whole_number(gt)
    found = _ANSWER.findall(solution_str)
    pred = normalize_final_answer(found[-1] if found else NOT_FOUND)
    return pred == expected, pred


def is_correct_strict_box(pred: str, gt: str, pause_tokens_index: list[int] | None = None) -> tuple[int, str | None]:
    r"""1 if the last ``\boxed`` of the last 100 characters holds exactly this text, else -1; and what it holds.

    Raises:
        ValueError: There are not four positions.
    """
    if pause_tokens_index is not None and len(pause_tokens_index) != 4:
        raise ValueError(f"pause_tokens_index has {len(pause_tokens_index)} positions; it has to have 4")
    start = -BOXED_TAIL if pause_tokens_index is None else max(0, pause_tokens_index[-1] - BOXED_TAIL)
    found = last_boxed(pred[start:])
    return (1 if found == gt else -1), found


def whole_number(label: object) -> str:
    """A label as the text of a whole number; digits behind the point are cut off.

    Raises:
        ValueError: It is no number.
    """
    text = str(label)
    if text.isdecimal() and text.isascii() and len(text) <= MOST_LABEL:
        return str(int(text))  # most are; data files are looked through before a run
    if len(text) > MOST_LABEL or not isinstance(label, str | int | float):
        raise ValueError("it has to be a number")
    text = normalize_final_answer(text)
    if re.fullmatch(r"[+-]?\d+", text):
        return str(int(text))  # as a float a long number would lose digits
    try:
        return str(int(float(text)))
    except (ValueError, OverflowError):
        raise ValueError("it has to be a number") from None


def normalize_final_answer(final_answer: str) -> str:
    """An answer without units, words and dollar signs, with braces around the arguments of fractions and roots."""
    text = final_answer.rpartition("=")[2]
    for old, new in (*_REPLACED, *((word, "") for word in _WORDS)):
        text = text.replace(old, new)
    for pattern, new in _PATTERNS:
        text = pattern.sub(new, text)
    text = text.replace("$", "")
    return (text.replace(",", "") if text.replace(",", "").isdigit() else text).strip()
