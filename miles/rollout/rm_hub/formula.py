"""Formulas as trees: a parser of arithmetic for text that a model wrote. Nothing is evaluated here, or by Python.

What can be written is what the algebra library's own reader takes after the comparison rules have removed TeX: numbers,
names, ``+ - * / ^ **``, factorials, brackets, and products without a sign (``2x``, ``3(x+1)``, ``xy``). Everything else
is ``NotAFormula``, and so is a text that is too long or too deep for a mathematical answer.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

MOST_CHARACTERS: Final = 1000
MOST_DEPTH: Final = 40
GROUP_OPEN, GROUP_CLOSE = "\u2985", "\u2986"
"""Brackets that stand for TeX's invisible braces (``2^{x+1}``); nobody types these."""
FUNCTIONS = frozenset({"sqrt", "ln", "frac"})
CONSTANTS = frozenset({"pi", "oo"})

Op: TypeAlias = Literal[
    "number", "symbol", "constant", "call", "sum", "product", "inverse", "minus", "power", "factorial"
]
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)|(?P<name>[^\W\d_]\w*)"
    rf"|(?P<sign>\*\*|[-+*/^()!{GROUP_OPEN}{GROUP_CLOSE}])"
)
_CLOSED_BY = {"(": ")", GROUP_OPEN: GROUP_CLOSE}


class NotAFormula(Exception):
    """A text that cannot be read as a formula."""


@dataclass(frozen=True, slots=True)
class Node:
    """A formula: what is done to which parts. ``text`` is the number, or the name."""

    op: Op
    parts: tuple[Node, ...] = ()
    text: str = ""


def parse(text: str) -> Node:
    """Read a formula.

    Raises:
        NotAFormula: It is none.
    """
    if len(text) > MOST_CHARACTERS:
        raise NotAFormula("too long")
    reader = _Reader(_tokens(text))
    tree = reader.sum(0)
    if reader.next is not None:
        raise NotAFormula(f"unexpected {reader.next[1]}")
    return tree


def _tokens(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotAFormula(f"unexpected {text[position]}")
        position = match.end()
        kind, word = match.lastgroup or "", match[0]
        if kind == "name":
            found.extend(_factors(word, is_called=text.startswith("(", position)))
        else:
            found.append((kind, "^" if word == "**" else word))
    return found


def _factors(name: str, *, is_called: bool) -> list[tuple[str, str]]:
    """What a name stands for: a function, a constant, one symbol (Greek, or with an index), or a product of letters."""
    if is_called and name in FUNCTIONS:
        return [("function", name)]
    if is_called and name.endswith("sqrt"):
        return [*_factors(name.removesuffix("sqrt"), is_called=False), ("function", "sqrt")]
    if name in CONSTANTS:
        return [("constant", name)]
    if not all(character.isalpha() or character in "_0123456789" for character in name):
        raise NotAFormula(f"unexpected {name}")  # a half, a square as one character
    if "_" in name or len(name) == 1 or _is_greek(name):
        return [("symbol", name)]
    parts = re.findall(r"[0-9]+|[^0-9]", name)
    return [("number" if part[0].isdigit() else "symbol", part) for part in parts]


def _is_greek(name: str) -> bool:
    try:
        return bool(unicodedata.lookup(f"GREEK SMALL LETTER {name}"))
    except KeyError:
        return False


class _Reader:
    """Reads tokens by precedence. ``next`` is the one that comes."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = iter(tokens)
        self.next: tuple[str, str] | None = None
        self._take()

    def _take(self) -> tuple[str, str]:
        taken = self.next
        self.next = next(self._tokens, None)
        return taken or ("", "")

    def _comes(self, *signs: str) -> bool:
        return self.next is not None and self.next[0] == "sign" and self.next[1] in signs

    def sum(self, depth: int) -> Node:
        """Terms with ``+`` and ``-`` between them."""
        if depth > MOST_DEPTH:
            raise NotAFormula("too deep")
        terms = [self._product(depth)]
        while self._comes("+", "-"):
            minus = self._take()[1] == "-"
            term = self._product(depth)
            terms.append(Node("minus", (term,)) if minus else term)
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _product(self, depth: int) -> Node:
        factors = [self._signed(depth)]
        while self.next is not None:
            if self._comes("*", "/"):
                inverse = self._take()[1] == "/"
                factor = self._signed(depth)
                factors.append(Node("inverse", (factor,)) if inverse else factor)
            elif self.next[0] != "sign" or self._comes(*_CLOSED_BY):
                factors.append(self._power(depth))
            else:
                break
        return factors[0] if len(factors) == 1 else Node("product", tuple(factors))

    def _signed(self, depth: int) -> Node:
        """A minus binds less than a power: ``-2^2`` is -4."""
        negative = False
        while self._comes("+", "-"):
            negative ^= self._take()[1] == "-"
        factor = self._power(depth)
        return Node("minus", (factor,)) if negative else factor

    def _power(self, depth: int) -> Node:
        if depth > MOST_DEPTH:
            raise NotAFormula("too deep")
        base = self._atom(depth)
        while self._comes("!"):
            self._take()
            base = Node("factorial", (base,))
        if self._comes("^"):
            self._take()
            base = Node("power", (base, self._signed(depth + 1)))
        return base

    def _atom(self, depth: int) -> Node:
        kind, text = self._take()
        if kind == "function":
            return Node("call", (self._bracket(self._take()[1], depth),), text)
        if kind in ("number", "symbol", "constant"):
            return Node("number" if kind == "number" else "symbol" if kind == "symbol" else "constant", text=text)
        if text in _CLOSED_BY:
            return self._bracket(text, depth)
        raise NotAFormula(f"unexpected {text or 'end'}")

    def _bracket(self, opened: str, depth: int) -> Node:
        inside = self.sum(depth + 1)
        if not self._comes(_CLOSED_BY[opened]):
            raise NotAFormula("a bracket is not closed")
        self._take()
        return inside
