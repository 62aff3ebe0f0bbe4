"""A calculator for a model to call: what it is told of the tool, and what makes the call.

--custom-generate-function-path miles.rollout.generate_hub.multi_turn.generate
--generate-tool-specs-path calculator.TOOLS
--generate-execute-tool-function-path calculator.execute
--custom-rm-path calculator.reward
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Work out an arithmetic expression of numbers with + - * / and brackets.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "such as (2+3)*4"}},
                "required": ["expression"],
            },
        },
    }
]

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


async def execute(name: str, arguments: dict[str, Any]) -> str:
    """Make a call. What it raises is told to the model, which may try again."""
    if name != "calculate":
        raise LookupError(f"there is no tool {name}")
    value = _value(ast.parse(str(arguments["expression"]), mode="eval").body)
    return f"{value:g}"


def _value(node: ast.expr) -> float:
    """Of numbers and the four operators only: nothing that a model writes is run."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
    raise ValueError("only numbers, + - * / and brackets")


async def reward(args: Any, sample: Any, **_: Any) -> float:
    """1 for an answer that ends with the label; a little for a call that worked."""
    worked = sample.metadata.get("tool_calls", 0) > sample.metadata.get("tool_errors", 0)
    right = sample.response.removesuffix("<|im_end|>").rstrip().endswith(str(sample.label))
    return 1.0 if right else 0.1 if worked else 0.0
