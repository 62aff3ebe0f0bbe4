"""Loss masks of conversations: which tokens an assistant wrote.

Found by templating ever longer parts of the conversation: what a message adds to the text before it is the message's.
Of an assistant's message, the header that a generation prompt would give is not its own. Templates that rewrite
earlier messages (thoughts that are cut away, say) have no such parts, and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles.utils.processing_utils import apply_chat_template
from miles_agents.errors import ConfigError

Message = dict[str, Any]
KINDS = ("qwen", "qwen3", "distill_qwen")


class BadConversation(ConfigError):
    """A conversation cannot be trained on."""

    code = "E-DATA-009"


class MultiTurnLossMaskGenerator:
    """Token ids and loss mask of a conversation.

    Args:
        tokenizer: With a chat template.
        tokenizer_type: ``--loss-mask-type``. ``qwen`` and ``qwen3``: every assistant message counts, with the token
            that ends it. ``distill_qwen``: the last message only.
    """

    def __init__(self, tokenizer: Any, tokenizer_type: str = "qwen") -> None:
        if tokenizer_type not in KINDS:
            raise BadConversation(
                f"--loss-mask-type {tokenizer_type} is not known",
                evidence=f"known are: {', '.join(KINDS)}",
                advice="Choose one of them.",
            )
        self.tokenizer = tokenizer
        self.tokenizer_type = tokenizer_type

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
        text = ""
        for i in range(len(messages)):
            for part, learnt in self._parts(messages, i, text, tools):
                ids = self._encode(part)
                tokens += ids
                mask += [learnt] * len(ids)
                text += part
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

    def _parts(self, messages: Sequence[Message], i: int, text: str, tools: Any) -> list[tuple[str, int]]:
        """What message ``i`` adds to ``text``, in stretches that are learnt or not."""
        whole = self._template(messages[: i + 1], tools, prompt=False)
        added = self._added(text, whole, messages[i])
        if not self._is_learnt(messages, i):
            return [(added, 0)]
        opened = self._template(messages[:i], tools, prompt=True) if i else ""
        header = opened[len(text) :] if opened.startswith(text) else ""
        if not header or not added.startswith(header):
            header = self._common_header(added, messages[i])
        body, tail = _split_tail(added[len(header) :])
        return [(header, 0), (body, 1), (tail, 0)]

    def _is_learnt(self, messages: Sequence[Message], i: int) -> bool:
        message = messages[i]
        if message.get("role") != "assistant" or not message.get("step_loss_mask", 1):
            return False
        return self.tokenizer_type != "distill_qwen" or i == len(messages) - 1

    def _common_header(self, added: str, message: Message) -> str:
        """Where the generation prompt is not how the message begins: all that stands before its content."""
        content = message.get("content")
        start = added.find(content) if isinstance(content, str) and content else -1
        return added[:start] if start > 0 else ""

    def _template(self, messages: Sequence[Message], tools: Any, *, prompt: bool) -> str:
        return str(apply_chat_template(self.tokenizer, list(messages), tools=tools, add_generation_prompt=prompt))

    def _added(self, text: str, whole: str, message: Message) -> str:
        if whole.startswith(text):
            return whole[len(text) :]
        raise BadConversation(
            "the chat template rewrites earlier messages of a conversation",
            evidence=f"adding the message of role {message.get('role')!r} changes the text before it",
            advice="Give a template by --chat-template-path that does not, or one conversation per answer.",
        )

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)] if text else []


def _split_tail(text: str) -> tuple[str, str]:
    """Line breaks after the token that ends a message are the template's, not the assistant's."""
    body = text.rstrip("\n")
    return body, text[len(body) :]
