r"""Text rules of the math rewards: finding the answer of a response, and writing answers in one form.

The form is that of the MATH benchmark (Hendrycks et al. 2021, "Measuring Mathematical Problem Solving With the MATH
Dataset"): two answers are equal if they are the same text after units, spacing and equivalent notations are removed.
"""

from __future__ import annotations

import re

MOST_BRACES = 20_000
"""A box with more braces than this is no answer: looking through it would take a noticeable time."""

_RENAMED = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip
_WHOLE_TEXT = re.compile(r"\\text\{(.+?)\}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, or ``\fbox{...}`` if there is none; None if its braces do not close."""
    command = "\\boxed" if "\\boxed" in text else "\\fbox"
    start = text.rfind(command)
    if start < 0:
        return None
    opened = re.compile(r"\s*\{").match(text, start + len(command))
    if opened is None:
        return None
    depth = 1
    for count, brace in enumerate(re.compile("[{}]").finditer(text, opened.end())):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[opened.end() : brace.start()]
        if count == MOST_BRACES:
            return None
    return None


def expected_answer(label: str) -> str | None:
    r"""The label, or what stands in its box."""
    return last_boxed(label) if "\\boxed" in label else label


def normalise(answer: str) -> str:
    """The answer in the benchmark's one form."""
    text = answer.strip()
    if (whole := _WHOLE_TEXT.fullmatch(text)) is not None:
        text = whole[1].strip()
    for old, new in _RENAMED:
        text = text.replace(old, new)
    text = _without_units(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    text = _without_name(text)
    text = re.sub(r"\\sqrt\s*([^{\s\[])", r"\\sqrt{\1}", text)
    text = _braced_fractions(text.replace(" ", ""))
    return "\\frac{1}{2}" if text == "0.5" else _slash_as_fraction(text)


def same_text(given: str, expected: str) -> bool:
    """Whether two answers have the same form."""
    return given == expected or normalise(given) == normalise(expected)


def _without_units(text: str) -> str:
    r"""Units stand at the end, as ``\text{ cm}``."""
    value, found, _ = text.partition("\\text{ ")
    return value if found and value else text


def _without_name(text: str) -> str:
    """``x = 5`` is ``5``: a name of one or two letters before the only equals sign."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and len(name) <= 2 else text


def _braced_fractions(text: str) -> str:
    r"""``\frac12`` and ``\frac1{72}`` as ``\frac{1}{2}`` and ``\frac{1}{72}``."""
    first, *parts = text.split("\\frac")
    made = [first]
    for part in parts:
        if part.startswith("{"):
            made.append(part)
        elif len(part) < 2:
            return text
        else:
            numerator, denominator, rest = part[0], part[1], part[2:]
            made.append(f"{{{numerator}}}" + (part[1:] if denominator == "{" else f"{{{denominator}}}{rest}"))
    return "\\frac".join(made)


def _slash_as_fraction(text: str) -> str:
    r"""``3/4``, both integers, as ``\frac{3}{4}``."""
    match = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else text
