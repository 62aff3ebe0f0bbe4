"""``--moe-layer-freq``: which layers have experts, as Megatron-LM's flag says it. Pure.

``3`` means every third layer, from the first one on; a list has a 1 for each layer with experts and a 0 for each
without, and may be written with ``*`` and ``+``: ``[0]*3+[1]*45``.
"""

from __future__ import annotations

import ast

LONGEST = 100_000
"""Entries of a list: no model has as many layers, and a slip of the finger costs no memory."""


def layer_pattern(text: str, layers: int) -> list[int]:
    """A 1 for each of the ``layers`` that has experts, else a 0.

    Raises:
        ValueError: It is neither a number nor such a list.
    """
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        found = None
    if isinstance(found, int) and found >= 1:
        return [int(layer % found == 0) for layer in range(layers)]
    if isinstance(found, list) and set(found) <= {0, 1}:
        return found
    raise ValueError(f"{text!r} is neither a number nor a list of 0 and 1")


def _value(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.List(elts=entries):
            values = [_value(entry) for entry in entries]
            if all(isinstance(value, int) for value in values):
                return values  # type: ignore[return-value]  # each is an int
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            one, other = _value(left), _value(right)
            if isinstance(one, list) and isinstance(other, list) and len(one) + len(other) <= LONGEST:
                return one + other
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            one, other = _value(left), _value(right)
            pattern, times = (one, other) if isinstance(one, list) else (other, one)
            if isinstance(pattern, list) and isinstance(times, int) and 0 <= len(pattern) * times <= LONGEST:
                return pattern * times
    raise TypeError("neither a number nor a list")
