r"""Text rules of the ``math`` reward: finding the answer of a response, and writing answers in one form.

The rules are those of the MATH benchmark (Hendrycks et al. 2021, "Measuring Mathematical Problem Solving With the MATH
Dataset"): two answers are equal if they are the same text after units, spacing and equivalent notations are removed.
"""

from __future__ import annotations

import re

_BOXES = ("\\boxed", "\\fbox")
_REMOVED = ("\\!", "\\$", "\\%", "%", "$", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\,", "\\;", "\\ ")
_RENAMED = (("\\tfrac", "\\frac"), ("\\dfrac", "\\frac"), ("\\cfrac", "\\frac"), ("\\neq", "\\ne"), ("\\leq", "\\le"),
            ("\\geq", "\\ge"))  # fmt: skip


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` with balanced braces, or of ``\boxed 7``."""
    start, command = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    rest = text[start + len(command) :]
    if rest.startswith(" "):
        return rest[1:].split("$")[0].strip()
    opened = rest.find("{")
    if opened < 0 or rest[:opened].strip():
        return None
    depth = 0
    for position in range(opened, len(rest)):
        depth += {"{": 1, "}": -1}.get(rest[position], 0)
        if depth == 0:
            return rest[opened + 1 : position]
    return None


def expected_answer(label: str) -> str | None:
    r"""The label, or what stands in its box."""
    return last_boxed(label) if "\\boxed" in label or "\\fbox" in label else label


def normalise(answer: str) -> str:
    """The answer in the benchmark's one form."""
    text = answer.replace("\n", "").strip().rstrip(".")
    for removed in _REMOVED:
        text = text.replace(removed, "")
    for old, new in _RENAMED:
        text = text.replace(old, new)
    text = _without_units(text)
    text = re.sub(r"(^|[{(,\[\s])\.(\d)", r"\g<1>0.\2", text)
    text = _without_name(text)
    text = re.sub(r"\\sqrt\s*([^{\s\[\\])", r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return _slash_as_fraction(text)


def same_text(given: str, expected: str) -> bool:
    """Whether two answers have the same form."""
    return given.strip() == expected.strip() or normalise(given) == normalise(expected)


def _without_units(text: str) -> str:
    r"""Units stand at the end, as ``\text{ cm}`` or ``\mbox{ cm}``; text that is the whole answer stays."""
    for command in ("\\text{ ", "\\mbox{ ", "\\mathrm{ "):
        start = text.rfind(command)
        if start > 0:
            text = text[:start]
    whole = re.fullmatch(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", text.strip())
    return whole[1] if whole else text


def _without_name(text: str) -> str:
    """``x = 5`` is ``5``: a name of one or two letters before the only equals sign."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and len(name.strip()) <= 2 else text


def _braced_fractions(text: str) -> str:
    r"""``\frac12`` and ``\frac1{72}`` as ``\frac{1}{2}`` and ``\frac{1}{72}``."""
    parts = text.split("\\frac")
    for i, part in enumerate(parts[1:], 1):
        if part.startswith("{") or len(part) < 2:
            continue
        numerator, rest = part[0], part[1:]
        parts[i] = f"{{{numerator}}}{rest}" if rest.startswith("{") else f"{{{numerator}}}{{{rest[0]}}}{rest[1:]}"
    return "\\frac".join(parts)


def _slash_as_fraction(text: str) -> str:
    r"""``3/4``, both integers, as ``\frac{3}{4}``."""
    match = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else text
