r"""Comparing two answers beyond their text: what can be decided quickly, and what needs algebra.

The rules are those of the published grader of the MATH benchmark by sympy (Lightman et al. 2023, "Let's Verify Step by
Step"): units, thousands separators and TeX go; tuples are compared element by element; unreduced fractions are wrong;
an integer must be matched by an integer; anything else is equal if the difference simplifies to zero, which is tried
only if it has at most two unknown letters and no towers of powers. What TeX groups (``2^{x+1}``, ``\frac{x+1}{2}``)
stays grouped. ``quick_verdict`` is cheap; ``equal_by_algebra`` may take for ever, so it runs in processes that can be
ended.
"""

from __future__ import annotations

import re

from miles.rollout.rm_hub.algebra import is_zero_difference
from miles.rollout.rm_hub.formula import GROUP_CLOSE, GROUP_OPEN, MOST_CHARACTERS
from miles.rollout.rm_hub.math_tex import plain_text

_UNITS = re.compile(
    r"(degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(es)?s?"
    r" *(\^[0-9]+)?"
)
_LARGE = (("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12"))
_FRACTION = re.compile(r"-?\d+\.?/0*[1-9]\d*\.?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_TOO_HARD = ("^{", "^(")
_TOWERS = re.compile(r"\^[0-9]+\^|\^[0-9][0-9]+")
_BRACKETS = "()[]"


def quick_verdict(given: str, expected: str) -> bool | None:
    """Whether the answers are equal; None if that takes reading TeX, or algebra."""
    if len(given) > MOST_CHARACTERS or len(expected) > MOST_CHARACTERS:
        return False
    number, wanted = as_integer(given.strip()), as_integer(expected.strip())
    if number is not None and wanted is not None:
        return number == wanted
    return None if "\\" in given or "\\" in expected else _verdict(given, expected)


def equal_by_algebra(given: str, expected: str) -> bool:
    """Whether two answers are equal. May not return in any reasonable time."""
    if len(given) > MOST_CHARACTERS or len(expected) > MOST_CHARACTERS:
        return False
    verdict = _verdict(given, expected)
    if verdict is not None:
        return verdict
    return all(
        quick if (quick := _quick_part(a, b)) is not None else is_zero_difference(a, b)
        for a, b in zip(split_tuple(plain_form(given)), split_tuple(plain_form(expected)), strict=True)
    )


def _verdict(given: str, expected: str) -> bool | None:
    one, other = plain_form(given), plain_form(expected)
    if one == other:
        return True
    if not one or not other:
        return False
    parts, wanted = split_tuple(one), split_tuple(other)
    if len(parts) != len(wanted) or (len(wanted) > 1 and (one[0], one[-1]) != (other[0], other[-1])):
        return False
    verdicts = [_quick_part(a, b) for a, b in zip(parts, wanted, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _quick_part(given: str, expected: str) -> bool | None:
    if given == expected:
        return True
    if _FRACTION.fullmatch(given) and _FRACTION.fullmatch(expected):
        return False  # the same text is the only right form of a fraction
    number, wanted = as_integer(given), as_integer(expected)
    if (number is None) != (wanted is None):
        return False
    if number is not None:
        return number == wanted
    return None if may_be_compared(given, expected) else False


def plain_form(answer: str) -> str:
    """An answer as a formula in plain characters: no TeX, no units, no thousands separators; lower case."""
    text = re.sub(r"^\\text\{(.+?)\}$", r"\1", answer.strip())
    for old, new in (("\\%", "%"), ("\\$", "$"), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , "), *_LARGE):
        text = text.replace(old, new)
    text = _UNITS.sub("", text)
    text = re.sub(r"\^ *(\\circ|\{\\circ\})", "", text)
    if text[:1] == "{" and text[-1:] == "}":
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    number = as_integer(text.strip())
    text = str(number) if number is not None else plain_text(text)
    text = re.sub(r"- *", "-", text)
    text = _mixed_numbers(text).replace(" ", "")
    text = re.sub(r"\^\{(-?\w+)\}", r"^\1", text)
    text = re.sub(r"\^\{([^{}]*)\}", rf"^{GROUP_OPEN}\1{GROUP_CLOSE}", text)
    text = text.replace("{", "").replace("}", "").lower()
    number = as_integer(without_commas(text))
    return str(number) if number is not None else text


def _mixed_numbers(text: str) -> str:
    """``7 3/4`` is a sum, of two negative parts if there is a minus before it. ``7 000`` is a number."""
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d./])", lambda match: match[0].replace(" ", ""), text)
    return re.sub(r"(-?)(\d+) +(?=\d)", lambda match: f"{match[1]}{match[2]}{match[1] or '+'}", text)


def without_commas(text: str) -> str:
    """``1,234,567`` as ``1234567``, wherever it stands."""
    previous = None
    while previous != text:
        previous, text = text, re.sub(r"(\d),(\d\d\d)(?=$|\D)", r"\1\2", text)
    return text


def split_tuple(text: str) -> list[str]:
    """The elements of ``(1,2)`` or ``[1,sqrt(2))``; anything else is one element."""
    text = without_commas(text)
    if len(text) <= 2 or text[0] not in _BRACKETS or text[-1] not in _BRACKETS:
        return [text]
    parts, depth = [""], 0
    for character in text[1:-1]:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if depth < 0:
            return [text]
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if depth == 0 else [text]


def as_integer(text: str) -> int | None:
    """The integer that a text is, written as one or as a float next to one."""
    if not _NUMBER.fullmatch(text):
        return None
    if text.lstrip("+-").isdecimal():
        return int(text) if len(text) <= MOST_CHARACTERS else None
    value = float(text)
    return round(value) if abs(value) < 1e15 and abs(value - round(value)) <= 1e-7 else None


def may_be_compared(*answers: str) -> bool:
    """Whether algebra has a chance: few unknowns, no towers of powers."""
    letters = {c for answer in answers for c in answer.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(letters) > 2:
        return False
    return not any(_TOWERS.search(answer) or any(part in answer for part in _TOO_HARD) for answer in answers)
