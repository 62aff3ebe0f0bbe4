"""Loss masks of conversations: which tokens an assistant wrote.

A conversation is taken apart into stretches of text, each learnt or not, which are tokenized one by one, as they are in
generation: an assistant's header is given to it, and what it writes begins a token of its own. What is an assistant's
own ends with the token that ends its message; a line break behind that is the template's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from miles.utils.processing_utils import apply_chat_template
from miles_agents.errors import ConfigError

Message = dict[str, Any]
Stretch = tuple[str, int]
"""Text, and 1 if it is learnt."""
KINDS = ("qwen", "qwen3", "distill_qwen")
_PROBE: Message = {"role": "user", "content": "?"}


class BadConversation(ConfigError):
    """A conversation cannot be trained on."""

    code = "E-DATA-009"


class MultiTurnLossMaskGenerator:
    """Token ids and loss mask of a conversation.

    Args:
        tokenizer: With a chat template.
        tokenizer_type: ``--loss-mask-type``:

            * ``qwen``: the conversation as the template writes it; every assistant message is learnt. A template that
              rewrites earlier messages (cuts thoughts out of them, say) has no such form, and is refused.
            * ``qwen3``: each assistant message as the template writes it while it is the last one, so with its
              thoughts; all of them are learnt, one after the other in one sequence.
            * ``distill_qwen``: the last message only, word for word as the data has it, behind the prompt that the
              template makes of those before; and the tokenizer's end token.
        template_kwargs: Of the template, as ``--apply-chat-template-kwargs``.
    """

    def __init__(
        self, tokenizer: Any, tokenizer_type: str = "qwen", template_kwargs: dict[str, Any] | None = None
    ) -> None:
        if tokenizer_type not in KINDS:
            raise BadConversation(
                f"--loss-mask-type {tokenizer_type} is not known",
                evidence=f"known are: {', '.join(KINDS)}",
                advice="Choose one of them.",
            )
        self.tokenizer = tokenizer
        self.tokenizer_type = tokenizer_type
        self._kwargs = {k: v for k, v in (template_kwargs or {}).items() if k != "add_generation_prompt"}

    def get_loss_mask(self, messages: Sequence[Message], tools: Any = None) -> tuple[list[int], list[int]]:
        """Token ids of the whole conversation, and 1 for each token that is learnt. Same lengths.

        A message with ``"step_loss_mask": 0`` is not learnt.

        Raises:
            BadConversation: No assistant message, or the template rewrites earlier messages.
        """
        if not any(m.get("role") == "assistant" for m in messages):
            raise BadConversation(
                "a conversation has no assistant message to learn",
                evidence=f"its roles are: {', '.join(str(m.get('role')) for m in messages)}",
                advice="Check --input-key, and that the data holds whole conversations.",
            )
        tokens: list[int] = []
        mask: list[int] = []
        for text, learnt in self.stretches(list(messages), tools):
            ids = self._encode(text)
            tokens += ids
            mask += [learnt] * len(ids)
        return tokens, mask

    def get_loss_mask_with_multimodal_alignment(
        self, messages: Sequence[Message], input_ids: Sequence[int], tools: Any = None
    ) -> tuple[list[int], list[int]]:
        """The same for a conversation whose media a processor has expanded: the mask is moved to its tokens."""
        tokens, mask = self.get_loss_mask(messages, tools)
        added = len(input_ids) - len(tokens)
        if added < 0:
            raise BadConversation(
                "the processor made fewer tokens than the chat template",
                evidence=f"{len(input_ids)} and {len(tokens)}",
                advice="Use the processor that belongs to the tokenizer.",
            )
        # Media stand in questions, before what is learnt last.
        return list(input_ids), [0] * added + mask

    def get_text_from_loss_mask(self, tokens: Sequence[int], mask: Sequence[int]) -> list[str]:
        """The learnt stretches as text, for people."""
        found: list[list[int]] = []
        before = 0
        for token, learnt in zip(tokens, mask, strict=True):
            if learnt:
                found = found if before else [*found, []]
                found[-1].append(token)
            before = learnt
        return [str(self.tokenizer.decode(part)) for part in found]

    def stretches(self, messages: list[Message], tools: Any) -> Iterator[Stretch]:
        """The conversation's text in order, in stretches that are learnt or not."""
        if self.tokenizer_type == "distill_qwen":
            yield from self._last_answer(messages, tools)
            return
        blocks = _blocks(messages)
        before = ""
        for start, end in blocks:
            if self.tokenizer_type == "qwen3":
                before = self._before(messages, start, tools)
            else:
                before = self._template(messages[:start], tools) if start else ""
            whole = self._whole(messages, start, end, tools)
            added = self._added(before, whole, messages[start])
            if messages[start].get("role") != "assistant" or not messages[start].get("step_loss_mask", 1):
                yield added, 0
                continue
            header = self._header(messages[:start], tools, before, added)
            body = added[len(header) :]
            own = body.rstrip("\n")
            yield header, 0
            yield own, 1
            yield body[len(own) :], 0

    # -- the whole conversation, and message by message --------------------------------------------------------

    def _before(self, messages: list[Message], start: int, tools: Any) -> str:
        """``qwen3``: what stands before a block where the block is the last one."""
        if not start:
            return ""
        if messages[start].get("role") == "assistant":
            return self._template(messages[:start], tools)
        return self._template([_PROBE], None)

    def _whole(self, messages: list[Message], start: int, end: int, tools: Any) -> str:
        if self.tokenizer_type == "qwen3" and start and messages[start].get("role") != "assistant":
            # Behind a question instead of all that was said: that a question follows may have changed it.
            return self._template([_PROBE, *messages[start:end]], None)
        return self._template(messages[:end], tools)

    def _header(self, before: list[Message], tools: Any, text: str, added: str) -> str:
        """What of an assistant's message is given to it: as much of the generation prompt as the message begins with.

        Where they part within it, only whole lines and special tokens count.
        """
        if not before:
            opened = self._template([_PROBE], None, prompt=True)[len(self._template([_PROBE], None)) :]
        else:
            whole = self._template(before, tools, prompt=True)
            opened = whole[len(text) :] if whole.startswith(text) else ""
        shared = _common(opened, added)
        if shared == opened:
            return shared
        ends = [shared.rfind(mark) + len(mark) for mark in ("\n", *self._special()) if mark in shared]
        return shared[: max(ends)] if ends else shared

    def _special(self) -> list[str]:
        return [str(token) for token in getattr(self.tokenizer, "all_special_tokens", ())]

    def _added(self, text: str, whole: str, message: Message) -> str:
        if whole.startswith(text):
            return whole[len(text) :]
        raise BadConversation(
            "the chat template rewrites earlier messages of a conversation",
            evidence=f"adding the message of role {message.get('role')!r} changes the text before it",
            advice="Give --loss-mask-type qwen3, which takes each answer as it was when it was the last one; or a "
            "template by --chat-template-path that leaves earlier messages as they are; or one conversation per answer."
            if self.tokenizer_type == "qwen"
            else "Give a template by --chat-template-path that does not, or one conversation per answer.",
        )

    # -- the last message only ---------------------------------------------------------------------------------

    def _last_answer(self, messages: list[Message], tools: Any) -> Iterator[Stretch]:
        last = messages[-1]
        if last.get("role") != "assistant" or len(messages) < 2:
            raise BadConversation(
                "--loss-mask-type distill_qwen learns the last message, which is no answer to anything",
                evidence=f"the roles are: {', '.join(str(m.get('role')) for m in messages)}",
                advice="Let each conversation end with an assistant's message, or give --loss-mask-type qwen.",
            )
        prompt = self._template(messages[:-1], tools, prompt=True)
        answer = _with_thoughts(last)
        opening = "<think>\n" if prompt.endswith("<think>\n") else "<think>" if prompt.endswith("<think>") else ""
        answer = answer.removeprefix(opening)
        end = str(self.tokenizer.eos_token or "")
        yield prompt, 0
        yield answer if not end or answer.endswith(end) else answer + end, int(bool(last.get("step_loss_mask", 1)))

    # -- the tokenizer ------------------------------------------------------------------------------------------

    def _template(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        return str(
            apply_chat_template(
                self.tokenizer, list(messages), tools=tools, add_generation_prompt=prompt, **self._kwargs
            )
        )

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)] if text else []


def _blocks(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Each assistant message by itself, and the others that stand together: templates join results of tools."""
    blocks: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        alone = message.get("role") == "assistant" or (i and messages[i - 1].get("role") == "assistant")
        if alone or not blocks:
            blocks.append((i, i + 1))
        else:
            blocks[-1] = (blocks[-1][0], i + 1)
    return blocks


def _common(one: str, other: str) -> str:
    """What both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _with_thoughts(message: Message) -> str:
    content = str(message.get("content") or "")
    thoughts = message.get("reasoning_content")
    if not thoughts or "</think>" in content:
        return content
    return f"<think>\n{str(thoughts).strip()}\n</think>\n\n{content}"
