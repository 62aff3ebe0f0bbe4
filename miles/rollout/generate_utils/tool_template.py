"""What a chat template puts between the end of an answer with tool calls and the next answer: the results of tools.

A conversation is never written anew: what the model made stays as it made it. So the template is shown a conversation
of its own, whose answer can be told apart, and only what follows that answer is taken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from miles.utils.processing_utils import NoChatTemplate, apply_chat_template

_MARK = "7f3a9c51"
_NO_CALL = "invalid"


def tool_turn_text(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    stop: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """What comes after an answer's text: the end of its turn, the messages, the beginning of the next answer.

    Args:
        messages: ``{"role": "tool", "content", "name", "tool_call_id"}``, in order, or of other roles.
        stop: The token with which the answer was ended, as text; what the template has up to its end is left out. None:
            the answer was not ended, and the template's end of a turn comes first.

    Raises:
        NoChatTemplate: There is none, or it cannot show such a conversation.
    """
    mark = _unlike(messages)
    rendered = _rendered(tokenizer, mark, messages, tools, template_kwargs or {})
    after = rendered[rendered.rindex(mark) + len(mark) :]
    first = str(messages[0]["content"]).strip()
    turn_end = after[: after.find(first)] if first and first in after else after
    for end in (stop, getattr(tokenizer, "eos_token", None)):
        if end and end in turn_end:
            at = turn_end.index(end)
            return after[at + len(end) :] if stop is not None else after[at:]
    raise NoChatTemplate(
        "the chat template does not end an answer before the results of tools",
        evidence=f"after an answer it has {turn_end[:300]!r}; looked for {stop!r} and {tokenizer.eos_token!r}",
        advice="Give a template whose answers end with the tokenizer's eos_token, by --chat-template-path.",
    )


def _unlike(messages: Sequence[dict[str, Any]]) -> str:
    """A mark that no message has."""
    mark, text = _MARK, json.dumps([str(message["content"]) for message in messages])
    while mark in text:
        mark += "x"
    return mark


def _rendered(
    tokenizer: Any,
    mark: str,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    kwargs: dict[str, Any],
) -> str:
    """A conversation with an answer that ends with the mark, as far as it is the model's own words."""
    calls = [
        {
            "id": message.get("tool_call_id") or f"call{place}",
            "type": "function",
            "function": {"name": message.get("name") or _NO_CALL, "arguments": {"mark": mark}},
        }
        for place, message in enumerate(messages)
        if message["role"] == "tool"
    ]
    plain: dict[str, Any] = {"role": "assistant", "content": mark}
    refusal: NoChatTemplate | None = None
    with_calls = [{**plain, "tool_calls": calls}] if calls else []
    for answer in (*with_calls, plain):  # some know nothing of calls, and show what was said
        conversation = [{"role": "user", "content": "."}, answer, *messages]
        try:
            rendered = str(apply_chat_template(tokenizer, conversation, tools=tools, **kwargs))
        except NoChatTemplate as error:
            refusal = refusal or error
            continue
        if mark in rendered:
            return rendered
    raise refusal or NoChatTemplate(
        "the chat template leaves answers with tool calls out",
        evidence=f"of {getattr(tokenizer, 'name_or_path', tokenizer)}",
        advice="Give a template that shows them, by --chat-template-path.",
    )
