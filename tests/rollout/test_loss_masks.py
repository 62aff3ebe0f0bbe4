"""Loss masks of conversations with tools and thoughts, on templates with the habits of published families."""

import pytest
from support.chat_templates import QWEN, QWEN3, R1
from support.rollout_cases import make_args, make_config, manager, text_of, write_jsonl
from support.tiny_models import tiny_model

from miles.rollout.sft_rollout import complete
from miles.utils.mask_utils import BadConversation, MultiTurnLossMaskGenerator
from miles.utils.processing_utils import load_tokenizer
from miles.utils.types import Sample

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def call(**arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


WITH_TOOLS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+2, 3+3?"},
    {"role": "assistant", "content": "", "tool_calls": [call(a=2), call(a=3)]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "4, 6"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "welcome"},
]
CALLS = '<tool_call>add {"a": 2}</tool_call>\n<tool_call>add {"a": 3}</tool_call><|im_end|>'
THOUGHTS = ["which tool?", "so it is", None]


def with_thoughts(inside):
    """The same with thoughts in the first two answers: in a field of their own, or inside the content."""
    talk, left = [], list(THOUGHTS)
    for message in WITH_TOOLS:
        added = dict(message)
        if message["role"] == "assistant" and (thought := left.pop(0)):
            if inside:
                added["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
            else:
                added["reasoning_content"] = thought
        talk.append(added)
    return talk


@pytest.fixture
def masks_of(tmp_path):
    def make(template, kind="qwen", **kwargs):
        (tmp_path / "t.jinja").write_text(template)
        tokenizer = load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja"), model_max_length=10**6)
        return MultiTurnLossMaskGenerator(tokenizer, kind, kwargs)

    return make


def learnt(masks, talk, tools=None):
    tokens, mask = masks.get_loss_mask(talk, tools)
    assert len(tokens) == len(mask)
    return masks.get_text_from_loss_mask(tokens, mask), text_of(tokens, with_special=True)


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_calls_of_tools_are_learnt_and_their_results_are_not(masks_of, kind, tools):
    masks = masks_of(QWEN, kind)
    found, whole = learnt(masks, WITH_TOOLS, tools)
    assert found == [CALLS, "4, 6<|im_end|>", "welcome<|im_end|>"]
    assert whole == masks.tokenizer.apply_chat_template(WITH_TOOLS, tools=tools, tokenize=False)
    assert "<tool_response>4</tool_response>\n<tool_response>6</tool_response>" in whole
    assert ("tools: add" in whole) == bool(tools)


@pytest.mark.parametrize("inside", [False, True])
def test_qwen3_learns_each_answer_with_its_thoughts(masks_of, inside):
    found, whole = learnt(masks_of(QWEN3, "qwen3"), with_thoughts(inside), TOOLS)
    assert found == [
        f"<think>\nwhich tool?\n</think>\n\n{CALLS}", "<think>\nso it is\n</think>\n\n4, 6<|im_end|>",
        "<think>\n\n</think>\n\nwelcome<|im_end|>",
    ]  # fmt: skip
    assert whole.count("<|im_start|>system") == 1
    assert whole.count("<tool_response>") == 2
    assert "?" not in whole.replace("3+3?", "").replace("which tool?", "")  # the question that was put in front is gone


def test_what_the_template_rewrites_is_refused_by_qwen_and_the_other_kind_is_named(masks_of):
    with pytest.raises(BadConversation, match=r"rewrites earlier messages(?s:.*)--loss-mask-type qwen3"):
        masks_of(QWEN3).get_loss_mask(with_thoughts(inside=False))


def test_of_thoughts_behind_the_last_question_nothing_is_rewritten(masks_of):
    masks = masks_of(QWEN3)
    talk = with_thoughts(inside=False)[:6]
    found, whole = learnt(masks, talk)
    assert found[1] == "<think>\nso it is\n</think>\n\n4, 6<|im_end|>"
    assert whole == masks.tokenizer.apply_chat_template(talk, tokenize=False)


def test_settings_of_the_template_decide_what_is_given_to_an_answer(masks_of):
    """Without thinking, the empty thought is part of the generation prompt."""
    talk = [*WITH_TOOLS[:2], {"role": "assistant", "content": "4"}]
    assert learnt(masks_of(QWEN3, "qwen3", enable_thinking=False), talk)[0] == ["4<|im_end|>"]
    assert learnt(masks_of(QWEN3, "qwen3"), talk)[0] == ["<think>\n\n</think>\n\n4<|im_end|>"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_steps_can_be_left_out(masks_of, kind):
    talk = [{**m, "step_loss_mask": int(m["content"] != "4, 6")} for m in WITH_TOOLS]
    found, whole = learnt(masks_of(QWEN, kind), talk)
    assert found == [CALLS, "welcome<|im_end|>"]
    assert "4, 6" in whole


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"content": "<think>\nhm\n</think>\n\n6"}, "hm\n</think>\n\n6<|im_end|>"),
        ({"content": "6", "reasoning_content": "hm"}, "hm\n</think>\n\n6<|im_end|>"),
        ({"content": "6<|im_end|>"}, "6<|im_end|>"),
        ({"content": "6"}, "6<|im_end|>"),
    ],
)
def test_distill_qwen_learns_the_last_answer_word_for_word(masks_of, answer, text):
    talk = [
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\nlong\n</think>4"},
        {"role": "user", "content": "3+3?"}, {"role": "assistant", **answer},
    ]  # fmt: skip
    masks = masks_of(R1, "distill_qwen")
    found, whole = learnt(masks, talk)
    assert found == [text]
    assert whole == f"[U]2+2?[A]4<|im_end|>[U]3+3?[A]<think>\n{text}"
    talk[-1]["step_loss_mask"] = 0
    assert learnt(masks, talk)[0] == []
    for bad in (talk[:3], talk[1:2]):
        with pytest.raises(BadConversation, match="no answer to anything"):
            masks.get_loss_mask(bad)


def test_an_answer_comes_first(masks_of):
    talk = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    found, whole = learnt(masks_of(QWEN3, "qwen3"), talk)
    assert found == ["<think>\n\n</think>\n\nhello<|im_end|>"]
    assert whole.endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_where_the_generation_prompt_and_the_answer_part(masks_of):
    """The header ends with a whole line or special token, not within the answer's words."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\\nthe answer is ' if add_generation_prompt }}"
    )
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "the sum is 4"}]
    assert learnt(masks_of(template), talk)[0] == ["the sum is 4<|im_end|>"]
    talk[1]["content"] = "the answer is 4"
    assert learnt(masks_of(template), talk)[0] == ["4<|im_end|>"]


def test_supervised_samples_are_cut_at_the_context(masks_of):
    masks = masks_of(QWEN)
    args = make_args(rollout_max_context_len=len(text_of(masks.get_loss_mask(WITH_TOOLS)[0], with_special=True)))
    sample = Sample(prompt=WITH_TOOLS, metadata={"tools": TOOLS})
    complete(sample, masks.tokenizer, masks, args)
    assert len(sample.tokens) <= args.rollout_max_context_len
    assert sample.response_length == len(sample.loss_mask)
    vars(args)["rollout_max_context_len"] = 10
    with pytest.raises(BadConversation, match=r"nothing to learn(?s:.*)within --rollout-max-context-len 10"):
        complete(Sample(prompt=WITH_TOOLS), masks.tokenizer, masks, args)


async def test_a_supervised_rollout_uses_kind_template_and_settings(tmp_path):
    (tmp_path / "t.jinja").write_text(QWEN3)
    rows = [{"prompt": with_thoughts(inside=False), "tools": TOOLS}] * 4
    config = make_config(
        prompt_data=write_jsonl(tmp_path / "p.jsonl", rows), label_key=None, run_dir=str(tmp_path),
        rollout_function_path="miles.rollout.sft_rollout.generate_rollout", n_samples_per_prompt=1,
        global_batch_size=4, loss_type="sft_loss", loss_mask_type="qwen3",
        chat_template_path=str(tmp_path / "t.jinja"), apply_chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    with manager(config) as rollout:
        await rollout.start([], "", "")
        [ref] = (await rollout.generate(0)).refs
        part = rollout.shipped[ref]
    size, response = part["total_lengths"][0], part["response_lengths"][0]
    tokens, mask = part["tokens"][:size], part["loss_masks"][:response]
    text = text_of(tokens[size - response :][mask == 1], with_special=True)
    assert text.endswith("welcome<|im_end|>")
    assert "</think>\n\nwelcome" not in text  # the empty thought is given
    assert "which tool?" in text
    assert "tools: add" in text_of(tokens)
