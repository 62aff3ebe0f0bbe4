r"""Comparing two answers beyond their text: what can be decided quickly, and what needs algebra.

The rules follow the published practice of grading MATH by sympy (Lightman et al. 2023, "Let's Verify Step by Step"):
tuples element by element, unreduced fractions are wrong, an integer must be matched by an integer, anything else is
equal if the difference simplifies to zero. ``quick_verdict`` is cheap; ``equal_by_algebra`` may take for ever, so it
runs in processes that can be ended.
"""

from __future__ import annotations

import re

from miles.rollout.rm_hub.math_text import normalise

_UNITS = (
    "degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year", "foot",
    "feet", "inch", "yard", "dollar", "cent", "mph", "unit", "liter", "gram", "kg", "point", "percent",
)  # fmt: skip
_SYMBOLS = {
    "\u221a": "sqrt", "\u03c0": "pi", "\u221e": "inf", "\u222a": "U", "\u00b7": "*", "\u00d7": "*", "\u2212": "-",
}  # fmt: skip
_FRACTION = re.compile(r"-?\d+(?:\.\d+)?/-?\d+(?:\.\d+)?")
_TOO_HARD = ("^{", "^(")
_PLAIN = re.compile(r"[0-9a-z+\-*/^().,=! ]*")
"""The algebra library evaluates what it is given as Python: only formulas may get there."""
_BAD_PATTERNS = (re.compile(r"\^[0-9]+\^"), re.compile(r"\^[0-9][0-9]+"), re.compile(r"\*\*.*\*\*"))
_PAIRS = {("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")}


def quick_verdict(given: str, expected: str) -> bool | None:
    """Whether the answers are equal; None if that takes algebra."""
    one, other = plain_form(given), plain_form(expected)
    if not one or not other:
        return False
    if one == other:
        return True
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


def equal_by_algebra(given: str, expected: str) -> bool:
    """Whether all parts of two answers are equal as expressions. May not return in any reasonable time."""
    parts, wanted = split_tuple(plain_form(given)), split_tuple(plain_form(expected))
    if len(parts) != len(wanted):
        return False
    return all(
        verdict if (verdict := _quick_part(a, b)) is not None else _difference_is_zero(a, b)
        for a, b in zip(parts, wanted, strict=True)
    )


def _difference_is_zero(given: str, expected: str) -> bool:
    import sympy
    from sympy.parsing.sympy_parser import implicit_multiplication_application, parse_expr, standard_transformations

    transformations = (*standard_transformations, implicit_multiplication_application)
    expression = f"({expected})-({given})".replace("^", "**")
    try:
        return bool(sympy.simplify(parse_expr(expression, transformations=transformations)) == 0)
    except Exception:  # noqa: BLE001 - boundary: text that a model wrote is parsed as algebra; anything may be raised
        return False


def plain_form(answer: str) -> str:
    """An answer as a formula in plain characters: no TeX, no units, no thousands separators; lower case."""
    text = normalise_numbers(normalise(answer))
    if "\\" in text:
        text = _from_tex(text)
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    text = text.strip().replace(" ", "")
    for unit in _UNITS:
        text = re.sub(rf"(?<=[\d)]){unit}(es|s)?(\^[0-9]+)?$", "", text)
    text = text.replace("{", "").replace("}", "").lower()
    value = as_float(text)
    return str(round(value)) if value is not None and abs(value - round(value)) < 1e-7 else text


def normalise_numbers(text: str) -> str:
    """``1,000`` as ``1000``; ``7 3/4`` and the like are sums."""
    previous = None
    while previous != text:
        previous = text
        text = re.sub(r"(?<![\d,(\[])(\d{1,3}),(\d{3})(?=$|\D)(?![\d])", r"\1\2", text)
        text = re.sub(r"(?<=\d)(\d{0,2}),(\d{3})(,\d{3})*(?=$|[^\d,)\]])", lambda m: m[0].replace(",", ""), text)
    return re.sub(r"(?<=\d)(\\frac\{\d+\}\{\d+\})", r"+\1", text)


def _from_tex(text: str) -> str:
    from pylatexenc import latex2text

    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\((-?[\w.]+)\)/\((-?[\w.]+)\)", r"\1/\2", text)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", " pi ").replace("\\infty", "inf")
    try:
        return str(latex2text.LatexNodes2Text(math_mode="text").latex_to_text(text))
    except Exception:  # noqa: BLE001 - boundary: text that a model wrote
        return text


def split_tuple(text: str) -> list[str]:
    """The elements of ``(1,2)`` or ``[1,2)``; anything else is one element."""
    if len(text) > 2 and (text[0], text[-1]) in _PAIRS and not any(c in "()[]" for c in text[1:-1]):
        return [part.strip() for part in text[1:-1].split(",")]
    return [text]


def as_integer(text: str) -> int | None:
    """The integer that a text is, written as one or as a float without a fraction."""
    value = as_float(text)
    return round(value) if value is not None and abs(value) < 1e15 and abs(value - round(value)) < 1e-7 else None


def as_float(text: str) -> float | None:
    """The number that a text is."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text):
        return None
    value = float(text)
    return value if abs(value) != float("inf") else None


def may_be_compared(*answers: str) -> bool:
    """Whether algebra has a chance: few unknowns, no towers of powers."""
    for answer in answers:
        letters = set(re.findall(r"[a-z]", answer.replace("sqrt", "").replace("frac", "").replace("pi", "")))
        if len(letters) > 2 or len(answer) > 300 or not _PLAIN.fullmatch(answer) or re.search(r"\.[a-z]", answer):
            return False
        if any(part in answer for part in _TOO_HARD) or any(pattern.search(answer) for pattern in _BAD_PATTERNS):
            return False
    return True
