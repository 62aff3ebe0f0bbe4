"""The calculator of examples/tools."""

import sys
from pathlib import Path

import pytest

from miles.rollout.generate_utils.tool_call_utils import ToolCall, checked_tools, execute_tool_calls
from miles.utils.types import Sample

EXAMPLE = Path(__file__).parents[2] / "examples" / "tools"


@pytest.fixture
def calculator(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import calculator

    yield calculator
    sys.modules.pop("calculator")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"expression": "17*23"}', "391"),
        ('{"expression": "(2+3)*4/8 - -1"}', "3.5"),
        ('{"expression": "1/0"}', "error: ZeroDivisionError: float division by zero"),
        ('{"expression": "__import__(\'os\')"}', "error: ValueError: only numbers, + - * / and brackets"),
        ('{"expression": "9**9"}', "error: ValueError: only numbers, + - * / and brackets"),
        ("{}", "error: KeyError: 'expression'"),
        ("not json", "error: the arguments of calculate are not valid JSON"),
    ],
)
async def test_calls(calculator, arguments, said):
    tools = checked_tools(calculator.TOOLS, "TOOLS")
    names = [tool["function"]["name"] for tool in tools]
    messages = await execute_tool_calls([ToolCall("calculate", arguments, "1")], calculator.execute, known=names)
    assert messages[0]["content"].startswith(said) and messages[0]["tool_call_id"] == "1"


async def test_rewards(calculator):
    sample = Sample(response="it is 391<|im_end|>", label="391")
    assert await calculator.reward(None, sample) == 1.0
    sample.response, sample.metadata = "what?", {"tool_calls": 1, "tool_errors": 0}
    assert await calculator.reward(None, sample) == 0.1
    sample.metadata = {"tool_calls": 1, "tool_errors": 1}
    assert await calculator.reward(None, sample) == 0.0
