"""Tools in a conversation: finding the calls in an answer, making them, and putting what they say into the sample.

Calls are found by the parser of the installed SGLang, asked over HTTP: the engines have it loaded. Whatever a model or
a tool does wrong becomes a message that the model reads; only what is wrong with the set-up is an error.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from miles.rollout.engines import engines
from miles.rollout.generate_utils.tool_template import tool_turn_text
from miles.rollout.hooks import Hook, HookFailed
from miles.utils.http_utils import RequestFailed, http_client, post
from miles.utils.types import Sample
from miles_agents.errors import ConfigError

logger = logging.getLogger(__name__)
ExecuteTool = Callable[[str, dict[str, Any]], Awaitable[Any]] | Hook
PARSE_RETRIES = 3
TOOL_TIMEOUT_S = 60.0
_ERROR_SHOWN = 500
_WARNINGS = 3
_LOOK_EVERY_S = 0.2
_told: Counter[str] = Counter()
_known_parsers: set[str] = set()


class BadTools(ConfigError):
    """What the flags say of tools cannot be used."""

    code = "E-TOOL-001"


@dataclass(frozen=True)
class ToolCall:
    """One call that a model makes.

    Attributes:
        name: Of the tool.
        arguments: JSON, as the parser gives it.
        id: Ties the result to the call.
    """

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer taken apart.

    Attributes:
        text: What is no tool call.
        calls: The calls, in order.
        unreadable: There is a call, but it is no valid JSON, or names a tool that there is not.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    unreadable: bool = False


class ToolCallParser:
    """Finds tool calls in answers, as SGLang's parser of that name does.

    Args:
        tools: As in OpenAI's ``tools``.
        name: One of the names that ``--sglang-tool-call-parser`` takes, such as ``qwen25``.
    """

    def __init__(self, tools: list[dict[str, Any]], name: str) -> None:
        self.tools = tools
        self.name = name

    async def parse(self, text: str) -> ParsedAnswer:
        """Take an answer apart.

        Raises:
            BadTools: SGLang has no such parser. RequestFailed: no engine answered.
        """
        if self.name not in _known_parsers and await self._ask("") is None:
            raise BadTools(
                f"--generate-tool-call-parser {self.name} is no parser of the engines",
                evidence="asked to parse an empty text, the engine fails",
                advice="Give one of the names that --sglang-tool-call-parser takes (train.py --help), such as qwen25.",
            )
        _known_parsers.add(self.name)
        found = await self._ask(text)
        if found is None:
            return ParsedAnswer(text, unreadable=True)
        calls = tuple(
            ToolCall(str(call["name"] or ""), str(call["parameters"] or "{}"), f"call_{uuid.uuid4().hex[:24]}")
            for call in found["calls"]
        )
        plain = str(found["normal_text"] or "")
        return ParsedAnswer(plain, calls, unreadable=not calls and plain.strip() != text.strip())

    async def _ask(self, text: str) -> dict[str, Any] | None:
        """What an engine says; None: the parser itself gave up."""
        body = {"text": text, "tools": self.tools, "tool_call_parser": self.name}
        try:
            answer = await post(engines.next_engine_url() + "/parse_function_call", body, max_retries=PARSE_RETRIES)
        except RequestFailed as error:
            if error.fields.get("status") != 500:
                raise
            return None
        return dict(answer)

    def parse_non_stream(self, text: str) -> tuple[str, list[ToolCall]]:
        """What is no call, and the calls. For code that is not async; async code awaits ``parse``."""
        parsed = http_client().wait_for(self.parse(text))
        return parsed.text, list(parsed.calls)


def create_tool_call_parser(tool_specs: list[dict[str, Any]], tool_call_parser: str) -> ToolCallParser:
    """A parser for answers of a model that has these tools.

    Raises:
        BadTools: The tools are not a list of functions.
    """
    return ToolCallParser(checked_tools(tool_specs, "tool_specs"), tool_call_parser)


def checked_tools(tools: Any, whose: str) -> list[dict[str, Any]]:
    """Raises BadTools unless it is a list of ``{"type": "function", "function": {"name": ...}}``."""
    listed = isinstance(tools, list | tuple)
    bad = [tool for tool in tools if not _is_tool(tool)] if listed else [tools]
    if bad or not tools:
        raise BadTools(
            f"{whose} is no list of tools",
            evidence=f"{str(bad[0])[:300] if bad else 'it is empty'}",
            advice='Give a list of {"type": "function", "function": {"name", "description", "parameters"}}.',
        )
    return [dict(tool) for tool in tools]


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


async def execute_tool_calls(
    tool_calls: Sequence[ToolCall],
    execute_one: ExecuteTool,
    *,
    known: Sequence[str] | None = None,
    timeout_s: float = TOOL_TIMEOUT_S,
    stops: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:
    """Make the calls of one answer, side by side.

    Args:
        execute_one: ``async fn(name, arguments) -> str``.
        known: Names of tools that there are; None: whatever ``execute_one`` takes.
        timeout_s: For each call.
        stops: Asked again and again whether to give up.

    Returns:
        A message per call, in order: what the tool said, or ``error: ...`` if arguments are no JSON object, if there is
        no such tool, if it raises, or takes too long.

    Raises:
        ToolsStopped: ``stops`` said so.
    """
    asked = _Asked(execute_one, None if known is None else tuple(known), timeout_s, stops)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(_message(call, asked)) for call in tool_calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


class ToolsStopped(Exception):
    """Tools were not waited for, because samples shall stop."""


@dataclass(frozen=True)
class _Asked:
    """How the calls of one answer are made."""

    execute_one: ExecuteTool
    known: tuple[str, ...] | None
    timeout_s: float
    stops: Callable[[], bool] | None


async def _message(call: ToolCall, asked: _Asked) -> dict[str, Any]:
    content = await _result(call, asked)
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


async def _result(call: ToolCall, asked: _Asked) -> str:
    known = asked.known
    if known is not None and call.name not in known:
        return f"error: there is no tool {call.name!r}; there are: {', '.join(known)}"
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError as error:
        return f"error: the arguments of {call.name} are not valid JSON: {error}"
    if not isinstance(arguments, dict):
        return f"error: the arguments of {call.name} are not a JSON object"
    try:
        result = await _bounded(asked.execute_one(call.name, arguments), asked)
    except ToolsStopped:
        raise
    except _TooLong:
        _warn(call.name, f"tool {call.name} was not done within {asked.timeout_s:g} s")
        return f"error: {call.name} was not done within {asked.timeout_s:g} s"
    except HookFailed as error:
        _warn(call.name, f"tool {call.name} raised:\n{error.evidence}")
        return f"error: {_last_line(error.evidence)}"
    except Exception as error:  # noqa: BLE001  # boundary: user code
        _warn(call.name, f"tool {call.name} raised {type(error).__name__}: {error}")
        return f"error: {type(error).__name__}: {error}"[:_ERROR_SHOWN]
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


class _TooLong(Exception):
    """A tool was not done in time."""


async def _bounded(call: Awaitable[Any], asked: _Asked) -> Any:
    """Its result. One that does not let itself be cancelled is not waited for."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(call)
    deadline = loop.time() + asked.timeout_s
    try:
        while not task.done():
            left_s = deadline - loop.time()
            if asked.stops is not None and asked.stops():
                raise ToolsStopped
            if left_s <= 0:
                raise _TooLong
            await asyncio.wait({task}, timeout=min(_LOOK_EVERY_S, left_s))
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    """What it raises is nobody's any more."""
    if not task.cancelled():
        task.exception()


def unreadable_message(known: Sequence[str]) -> dict[str, Any]:
    """What a model is told whose call could not be read."""
    content = f"error: the tool call is not valid JSON, or names no tool; there are: {', '.join(known)}"
    return {"role": "tool", "tool_call_id": f"call_{uuid.uuid4().hex[:24]}", "name": "", "content": content}


def is_error(message: dict[str, Any]) -> bool:
    """Whether a message says that a call failed."""
    return str(message["content"]).startswith("error: ")


def _last_line(trace: str) -> str:
    lines = [line for line in trace.splitlines() if line.strip()]
    return lines[-1][:_ERROR_SHOWN] if lines else "it raised"


def _warn(tool: str, text: str) -> None:
    """The first few of each tool."""
    _told[tool] += 1
    if _told[tool] <= _WARNINGS:
        logger.warning("%s%s", text, "; more of this tool are not logged" if _told[tool] == _WARNINGS else "")


def tokenize_tool_responses(
    tool_messages: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    stop: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Tokens between an answer and the next; see ``tool_turn_text``. Without ``stop``, the end of the turn is in."""
    text = tool_turn_text(tokenizer, tool_messages, stop=stop, tools=tools, template_kwargs=template_kwargs)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def update_sample_with_tool_responses(
    sample: Sample,
    tool_messages: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    max_tokens: int | None = None,
) -> int:
    """Append the results of tools to a sample whose last tokens are an answer: loss mask 0, log-probs 0.

    ``max_tokens``: the sample has no more than these afterwards. Returns how many tokens were left out for that.
    """
    stop = stop_text(sample, tokenizer)
    new = tokenize_tool_responses(tool_messages, tokenizer, stop=stop, tools=tools, template_kwargs=template_kwargs)
    room = len(new) if max_tokens is None else max(0, max_tokens - len(sample.tokens))
    taken = new[:room]
    mask = sample.loss_mask if sample.loss_mask is not None else [1] * sample.response_length
    sample.loss_mask = mask + [0] * len(taken)
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [0.0] * len(taken)
    sample.tokens = sample.tokens + taken
    sample.response += tokenizer.decode(taken)
    sample.response_length += len(taken)
    return len(new) - len(taken)


def stop_text(sample: Sample, tokenizer: Any) -> str | None:
    """The special token that a sample ends with, as text; None: it ends with none."""
    if not sample.response_length or not sample.tokens:
        return None
    last = sample.tokens[-1]
    known = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = last in known and known[last].special
    return str(tokenizer.decode([last])) if special or last == tokenizer.eos_token_id else None
