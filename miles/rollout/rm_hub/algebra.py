"""Whether two formulas are equal, by sympy. Runs in grader processes: it may take for ever.

The library gets numbers, symbols and operations one by one; it never reads text, as its reader is Python's ``eval``.
"""

from __future__ import annotations

from typing import Any, Final

from miles.rollout.rm_hub.formula import Node, NotAFormula, parse

MOST_BITS: Final = 50_000
"""Of an integer. More than any answer has, and still a matter of milliseconds."""
MOST_FACTORIAL: Final = 1000
_POINTS = ("0.7390851332151607", "1.6180339887498949", "2.2360679774997897", "0.5671432904097838")
_DIGITS = 25
_APART = 1e-9


def is_zero_difference(given: str, expected: str) -> bool:
    """Whether the difference of two formulas simplifies to zero; False if one of them is none."""
    import sympy

    try:
        one, other = expression_of(parse(given)), expression_of(parse(expected))
        if _apart(one, other):
            return False
        return bool(sympy.simplify(other - one) == 0)
    except Exception:  # noqa: BLE001 - boundary: a library at work on what a model wrote; anything may be raised
        return False


def expression_of(node: Node) -> Any:
    """A formula as an expression of sympy.

    Raises:
        NotAFormula: A number in it would be too large.
    """
    import sympy

    if node.op == "number":
        return sympy.Integer(int(node.text)) if node.text.isdigit() else _real(node.text)
    if node.op == "symbol":
        return sympy.Symbol(node.text)
    if node.op == "constant":
        return sympy.pi if node.text == "pi" else sympy.oo
    parts = [expression_of(part) for part in node.parts]
    if node.op == "call":
        return {"sqrt": sympy.sqrt, "ln": sympy.log, "frac": sympy.frac}[node.text](*parts)
    if node.op == "sum":
        return _bounded(sympy.Add(*parts))
    if node.op == "product":
        return _bounded(sympy.Mul(*parts))
    if node.op == "minus":
        return -parts[0]
    if node.op == "inverse":
        return sympy.Pow(parts[0], -1)
    if node.op == "factorial":
        return _factorial(parts[0])
    return _power(*parts)


def _real(text: str) -> Any:
    import sympy

    if abs(int(text.partition("e")[2] or "0")) > 400:
        raise NotAFormula("too large")
    return sympy.Float(text)


def _factorial(of: Any) -> Any:
    import sympy

    if of.is_number and not abs(sympy.N(of)) <= MOST_FACTORIAL:
        raise NotAFormula("too large")
    return sympy.factorial(of)


def _power(base: Any, exponent: Any) -> Any:
    """Powers that the library would work out at once are bounded by the length of what comes out."""
    import sympy

    if exponent.is_number:
        size = abs(sympy.N(exponent))
        bits = max(_bits(base), 1) if base.is_number else 16
        if not size * bits <= MOST_BITS:
            raise NotAFormula("too large")
    return sympy.Pow(base, exponent)


def _bits(number: Any) -> int:
    """Of the integers in a number's expression."""
    if number.is_Rational:
        return max(int(number.p).bit_length(), int(number.q).bit_length())
    return sum(_bits(part) for part in number.args)


def _bounded(number: Any) -> Any:
    if number.is_Rational and _bits(number) > 4 * MOST_BITS:
        raise NotAFormula("too large")
    return number


def _apart(one: Any, other: Any) -> bool:
    """Whether the values differ at some point, which costs a hundredth of simplifying and tells wrong answers."""
    import sympy

    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if len(symbols) > len(_POINTS):
        return False
    points = {symbol: sympy.Float(value, _DIGITS) for symbol, value in zip(symbols, _POINTS, strict=False)}
    a, b = (_value(expression, points) for expression in (one, other))
    if a is None or b is None:
        return False
    # Numbers of the library have exponents of any size: 2^900 is no overflow.
    return bool(abs(a - b) > _APART * sympy.Max(1, abs(a), abs(b)))


def _value(expression: Any, points: dict[Any, Any]) -> Any:
    """At these points, as a number of the library; None: it has none."""
    try:
        value = expression.evalf(_DIGITS, subs=points)
    except Exception:  # noqa: BLE001 - as above: then simplifying has to tell
        return None
    return value if value.is_number and value.is_finite else None


def warm_up() -> None:
    """Load what the first answer would wait for."""
    is_zero_difference("2sqrt(3)+x", "x+sqrt(12)")
