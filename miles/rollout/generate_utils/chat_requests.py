"""What an agent may ask of the OpenAI-compatible address: bodies are checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LIMITS = ("max_completion_tokens", "max_tokens")


class Refused(Exception):
    """A request that cannot be answered, with the status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def checked_body(body: Any) -> dict[str, Any]:
    """The body of ``/v1/chat/completions``, if it can be one; each message has a content. Tools are checked where they
    are used.

    Raises:
        Refused: 400, with what is wrong.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    if body.get("stream"):
        raise Refused(400, "streaming is not served")
    if body.get("n") not in (None, 1):
        raise Refused(400, "n is 1")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages is no list of messages")
    for place, message in enumerate(messages):
        _check_message(f"messages[{place}]", message)
    for name in _LIMITS:
        limit = body.get(name)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise Refused(400, f"{name} is no whole number of tokens: {limit!r:.100}")
    return {**body, "messages": [{"content": "", **message} for message in messages]}


def limit_of(body: Mapping[str, Any]) -> int | None:
    """How many tokens an answer may have, if the body says it. 0 says nothing."""
    return next((int(body[name]) for name in _LIMITS if body.get(name)), None)


def _check_message(where: str, message: Mapping[str, Any]) -> None:
    if not isinstance(message.get("role"), str):
        raise Refused(400, f"{where} has no role")
    if not isinstance(message.get("content"), str | list | None):
        raise Refused(400, f"{where}: content is neither text nor a list of parts")
    if "content" not in message and not message.get("tool_calls"):
        raise Refused(400, f"{where} has neither content nor tool_calls")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Refused(400, f"{where}: tool_calls is no list")
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(400, f"{where}: tool_calls[{place}] has no function with a name")
        if not isinstance(function.get("arguments"), str | dict | None):
            raise Refused(400, f"{where}: arguments of tool_calls[{place}] are neither text nor an object")


def message_key(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two messages the same: clients add and leave out fields that say nothing."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = [
        (call.get("id"), call["function"].get("name"), call["function"].get("arguments"))
        for call in message.get("tool_calls") or []
    ]
    return message.get("role"), content or "", message.get("tool_call_id"), tuple(calls)
