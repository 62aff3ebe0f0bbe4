"""What stands between an answer and the next: the same as the chat template writes for the whole conversation."""

import pytest
from support import chat_templates
from support.rollout_cases import ids_of
from support.tiny_models import IM_END_ID, tiny_model

from miles.rollout.generate_utils.tool_call_utils import (
    stop_text,
    tokenize_tool_responses,
    update_sample_with_tool_responses,
)
from miles.rollout.generate_utils.tool_template import tool_turn_text
from miles.utils.processing_utils import NoChatTemplate, load_tokenizer
from miles.utils.types import Sample

# Ends answers with a token that is not the tokenizer's; gives results a turn of their own each; writes calls as JSON.
LLAMA = (
    "{% for m in messages %}{% if m.role == 'tool' or m.role == 'user' %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|endoftext|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)
# Shows calls of an answer, and its words only where there is none; refuses results without a call of their id.
STRICT = (
    "{% set ns = namespace(ids=[]) %}{% for m in messages %}{% if m.role == 'user' %}{{ '[U]' + m.content }}"
    "{% elif m.role == 'assistant' %}{% for c in m.tool_calls or [] %}{% set ns.ids = ns.ids + [c.id] %}"
    "{{ '[C]' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ m.content if not m.tool_calls }}{{ '<|im_end|>' }}"
    "{% else %}{{ raise_exception('no such call') if m.tool_call_id not in ns.ids }}"
    "{{ '[R]' + m.content }}{% endif %}{% endfor %}{{ '[A]' if add_generation_prompt }}"
)
RESULTS = [
    {"role": "tool", "content": "4", "name": "add", "tool_call_id": "one"},
    {"role": "tool", "content": "ü <b>\n", "name": "search", "tool_call_id": "two"},
]
USER = {"role": "user", "content": "2+2?"}


def tokenizer_with(template):
    tokenizer = load_tokenizer(str(tiny_model()))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def answer(content="ok"):
    calls = [
        {"id": r["tool_call_id"], "type": "function", "function": {"name": r["name"], "arguments": {"a": 1}}}
        for r in RESULTS
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("template", "end"),
    [
        (chat_templates.QWEN, "<|im_end|>"),
        (chat_templates.QWEN3, "<|im_end|>"),
        (None, "<|im_end|>"),
        (LLAMA, "<|endoftext|>"),
        (STRICT, "<|im_end|>"),
    ],
    ids=["qwen", "qwen3", "plain", "llama", "strict"],
)
def test_it_is_what_the_template_writes_for_the_conversation(template, end, count):
    tokenizer = tokenizer_with(template)
    results = RESULTS[:count]
    whole = tokenizer.apply_chat_template([USER, answer(), *results], tokenize=False, add_generation_prompt=True)
    tail = tool_turn_text(tokenizer, results, stop=end)
    assert whole.endswith(tail)
    before = whole.removesuffix(tail)
    assert before.endswith(end) and "4" not in before[before.index("2+2?") + 4 :]
    if template is not LLAMA:  # whose end of an answer is not the tokenizer's
        assert tool_turn_text(tokenizer, results, stop=None) == end + tail
    ids = tokenize_tool_responses(results, tokenizer, stop=end)
    assert ids_of(before) + ids == tokenizer.encode(whole, add_special_tokens=False)


def test_settings_of_the_template_reach_the_next_answer():
    tokenizer = tokenizer_with(chat_templates.QWEN3)
    tail = tool_turn_text(tokenizer, RESULTS, stop="<|im_end|>", template_kwargs={"enable_thinking": False})
    assert tail.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_result_with_the_words_of_the_template_changes_nothing():
    tokenizer = tokenizer_with(None)
    odd = {**RESULTS[0], "content": "7f3a9c51 <|im_end|>"}
    tail = tool_turn_text(tokenizer, [odd], stop="<|im_end|>")
    assert tail == "\n<|im_start|>tool\n7f3a9c51 <|im_end|><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end an answer"),
        ("{{ messages[0].content }}", "leaves answers"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
    ],
)
def test_a_template_that_cannot_show_results_is_told(template, why):
    with pytest.raises(NoChatTemplate) as caught:
        tool_turn_text(tokenizer_with(template), RESULTS, stop="<|im_end|>")
    assert why in str(caught.value)


def sample_of(text, *, ended):
    ids = ids_of(text) + ([IM_END_ID] if ended else [])
    return Sample(
        tokens=[1, 2, *ids], response=text, response_length=len(ids), loss_mask=[1] * len(ids),
        rollout_log_probs=[-0.5] * len(ids),
    )  # fmt: skip


@pytest.mark.parametrize("ended", [True, False])
def test_results_are_appended_with_mask_and_log_probs_of_0(ended):
    tokenizer = tokenizer_with(None)
    sample = sample_of("hm", ended=ended)
    before = list(sample.tokens)
    assert stop_text(sample, tokenizer) == ("<|im_end|>" if ended else None)
    assert update_sample_with_tool_responses(sample, RESULTS[:1], tokenizer) == 0
    sample.validate()
    new = sample.tokens[len(before) :]
    assert sample.tokens[: len(before)] == before
    assert tokenizer.decode(sample.tokens[2:]) == "hm<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    made = len(before) - 2
    assert sample.loss_mask == [1] * made + [0] * len(new)
    assert sample.rollout_log_probs == [-0.5] * made + [0.0] * len(new)


def test_results_stop_at_the_most_tokens():
    sample = sample_of("hm", ended=True)
    whole = len(tokenize_tool_responses(RESULTS, tokenizer_with(None), stop="<|im_end|>"))
    assert update_sample_with_tool_responses(sample, RESULTS, tokenizer_with(None), max_tokens=9) == whole - 4
    assert len(sample.tokens) == 9
    assert update_sample_with_tool_responses(sample, RESULTS, tokenizer_with(None), max_tokens=5) > whole - 1
    sample.validate()
    assert len(sample.tokens) == 9


def test_a_sample_without_a_response_has_no_end():
    assert stop_text(Sample(tokens=[IM_END_ID]), tokenizer_with(None)) is None
