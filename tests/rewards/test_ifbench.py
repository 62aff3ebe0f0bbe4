"""``ifbench``: which instructions a row has, with which arguments, and what its reward is."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from miles.rollout.rm_hub import async_rm, batched_async_rm
from miles.rollout.rm_hub.ifbench import CannotCheck, compute_ifbench_reward, why_not_checked
from miles.rollout.rm_hub.ifbench_checks import BUILT, REFUSED, BadInstruction, document, find
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.utils.types import Sample

ARGS = SimpleNamespace(rm_type="ifbench", custom_rm_path=None)
NO_COMMA, NO_DOT = "punctuation:no_comma", "punctuation:punctuation_dot"
IFEVAL = """
change_case:capital_word_frequency change_case:english_capital change_case:english_lowercase combination:repeat_prompt
combination:two_responses detectable_content:number_placeholders detectable_content:postscript
detectable_format:constrained_response detectable_format:json_format detectable_format:multiple_sections
detectable_format:number_bullet_lists detectable_format:number_highlighted_sections detectable_format:title
keywords:existence keywords:forbidden_words keywords:frequency keywords:letter_frequency language:response_language
length_constraints:nth_paragraph_first_word length_constraints:number_paragraphs length_constraints:number_sentences
length_constraints:number_words punctuation:no_comma startend:end_checker startend:quotation
"""
IFBENCH = """
count:conjunctions count:keywords_multiple count:numbers count:person_names count:pronouns count:punctuation
count:unique_word_count count:word_count_range count:words_japanese custom:character_reverse custom:csv_city
custom:csv_quotes custom:csv_special_character custom:date_format_list custom:european_capitals_sort
custom:mcq_count_length custom:multiples custom:reverse_newline custom:sentence_alphabet custom:word_reverse
format:emoji format:line_indent format:list format:newline format:no_bullets_bullets format:no_whitespace
format:options format:output_template format:parentheses format:quote_unquote format:quotes format:sub-bullets
format:thesis format:title_case ratio:overlap ratio:sentence_balance ratio:sentence_type ratio:sentence_words
ratio:stop_words repeat:repeat_change repeat:repeat_simple repeat:repeat_span sentence:alliteration_increment
sentence:increment sentence:keyword words:alphabet words:consonants words:keywords_specific_position words:last_first
words:no_consecutive words:odd_even_syllables words:palindrome words:paragraph_last_first words:prime_lengths
words:repeats words:start_verb words:vowel words:words_position
"""
REWARDS = [
    # metadata, response, reward
    ({"instruction_id_list": [NO_COMMA], "kwargs": [{}]}, "fine", 1.0),
    ({"instruction_id_list": [NO_COMMA], "kwargs": None}, "a, b", 0.0),
    ({"instruction_id_list": [NO_COMMA]}, "fine", 1.0),
    ({"instruction_id_list": NO_COMMA}, "fine", 1.0),
    ({"instruction_id_list": [f" {NO_COMMA} "]}, "fine", 1.0),
    ({"instruction_id_list": [NO_COMMA], "kwargs": []}, "fine", 1.0),
    ({"instruction_id_list": [NO_COMMA]}, "", 0.0),
    ({"instruction_id_list": [NO_COMMA]}, " \n", 0.0),
    ({"instruction_id_list": [NO_COMMA, NO_DOT]}, "fine", 1.0),
    ({"instruction_id_list": [NO_COMMA, NO_DOT]}, "fine.", 0.0),
    ({"instruction_id_list": [NO_COMMA, NO_COMMA], "kwargs": [None, {}]}, "fine", 1.0),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": 1, "word": None, "other": 3}]}, "7", 1.0),
    ({"instruction_id_list": ["count:numbers"], "kwargs": {"N": 1.0}}, "7", 1.0),
    ({"instruction_id_list": ["count:numbers", "count:unique_word_count"], "kwargs": {"N": 2}}, "7 and 8", 1.0),
    ({"instruction_id_list": ["count:numbers", "count:unique_word_count"], "kwargs": [{"N": 2}]}, "7 8", 1.0),
    ({"instruction_id_list": ["count:numbers", "count:unique_word_count"], "kwargs": [{"N": 1}, {"N": 9}]}, "7", 0.0),
    ({"instruction_id_list": ["copy:copy"], "prompt_text": "Say so."}, "say so.", 1.0),
    ({"instruction_id_list": ["copy:copy"], "kwargs": [{"prompt_to_repeat": "Not so."}], "prompt_text": "Say so."},
     "Say so.", 0.0),
    ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["x("]}]}, "f X(1)", 1.0),
    # nothing is taken out of a response
    ({"instruction_id_list": [NO_COMMA]}, "<think>well, so</think>fine", 0.0),
    ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": "end"}]}, "the end<|im_end|>", 0.0),
    ({"instruction_id_list": ["count:word_count_range"], "kwargs": [{"min_words": 0, "max_words": 0}]}, "!", 1.0),
]  # fmt: skip
FAULTS = [
    (None, "there are no instructions"),
    ([], "there are no instructions"),
    ({}, "'instruction_id_list' is not a list of ids"),
    ({"instruction_id_list": []}, "'instruction_id_list' is not a list of ids"),
    ({"instruction_id_list": [1]}, "has 1, which is no id"),
    ({"instruction_id_list": ["a:strt_verb"], "record_id": 17}, "record 17: there is no instruction 'a:strt_verb'"),
    ({"instruction_id_list": ["words:strt_verb"]}, "near ids: words:start_verb"),
    ({"instruction_id_list": ["poem"]}, "no id is near it"),
    ({"instruction_id_list": ["keywords:key_sentences"]}, "'keywords:key_sentences' is refused: its authors"),
    ({"instruction_id_list": ["count:numbers"]}, "count:numbers lacks 'N'"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": None}]}, "count:numbers lacks 'N'"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"n": 1}]}, "count:numbers lacks 'N'"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": "1"}]}, "'N' of count:numbers is not a number"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": True}]}, "is not a number"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": -1}]}, "is not a whole number from 0; it is '-1'"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": 1.5}]}, "is not a whole number"),
    ({"instruction_id_list": ["count:numbers"], "kwargs": [{"N": float("nan")}]}, "is not a whole number"),
    ({"instruction_id_list": ["count:words_japanese"], "kwargs": [{"N": 0}]}, "is not a whole number from 1"),
    ({"instruction_id_list": ["ratio:stop_words"], "kwargs": [{"percentage": 101}]}, "a number from 0 to 100"),
    ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "x"}]}, "is not a list of texts"),
    ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": [" "]}]}, "a text that is not empty"),
    ({"instruction_id_list": ["keywords:letter_frequency"],
      "kwargs": [{"letter": "ab", "let_frequency": 1, "let_relation": "at least"}]}, "is not one letter"),
    ({"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 1, "relation": "around"}]},
     "is not one of less than, at least; it is 'around'"),
    ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "english"}]}, "the code of a"),
    ({"instruction_id_list": ["copy:copy"]}, "copy:copy lacks 'prompt_to_repeat'"),
    ({"instruction_id_list": [NO_COMMA] * 3, "kwargs": [{}] * 2}, "'kwargs' has 2 entries for 3 instructions"),
    ({"instruction_id_list": [NO_COMMA], "kwargs": "{}"}, "'kwargs' is neither an object nor a list of objects"),
    ({"instruction_id_list": [NO_COMMA], "kwargs": [1]}, "'kwargs' is neither an object nor a list of objects"),
]  # fmt: skip


@pytest.mark.parametrize(("metadata", "response", "reward"), REWARDS)
def test_rewards(metadata, response, reward):
    assert not why_not_checked(metadata)
    assert compute_ifbench_reward(response, "no label is looked at", metadata) == reward


@pytest.mark.parametrize(("metadata", "why"), FAULTS)
def test_rows_that_cannot_be_checked(metadata, why):
    assert why in why_not_checked(metadata)
    with pytest.raises(CannotCheck) as told:
        compute_ifbench_reward("text", None, metadata)
    assert why in str(told.value)


def test_no_response_follows_nothing_and_bad_rows_are_told_nevertheless():
    assert compute_ifbench_reward(None, None, {"instruction_id_list": [NO_COMMA]}) == 0.0
    with pytest.raises(CannotCheck):
        compute_ifbench_reward("", None, None)


def test_all_published_ids_are_known():
    ifeval, ifbench = IFEVAL.split(), IFBENCH.split()
    assert (len(ifeval), len(ifbench)) == (25, 58)
    assert {found.id for found in BUILT.values() if found.source == "IFEval"} == set(ifeval)
    assert {found.id for found in BUILT.values() if found.source == "IFBench"} == set(ifbench)
    assert len(BUILT) == 25 + 58 + 29
    assert not set(REFUSED) & set(BUILT)
    assert all(len(why) > 20 for why in REFUSED.values())


def test_every_instruction_says_what_it_checks():
    assert [found.id for found in BUILT.values() if not found.meaning.endswith(".") or len(found.meaning) < 15] == []


def test_an_instruction_whose_package_is_missing_is_refused_with_its_name():
    instruction("test:none", "test", needs="no_such_package")(lambda text: True)
    try:
        with pytest.raises(BadInstruction, match="needs the package no_such_package") as told:
            find("test:none")
        assert "miles[ifbench]" in told.value.advice
    finally:
        del BUILT["test:none"]


async def test_as_a_reward():
    row = {"instruction_id_list": [NO_COMMA], "kwargs": [{}]}
    samples = [Sample(index=n, prompt="p", response=text, metadata=row) for n, text in enumerate(["yes", "a, b"])]
    assert await batched_async_rm(ARGS, samples) == [1.0, 0.0]
    named = Sample(prompt="p", response="so", metadata={**row, "rm_type": "ifbench"})
    assert await async_rm(SimpleNamespace(rm_type="math", custom_rm_path=None), named) == 1.0
    boxed = Sample(prompt="p", response="well, \\boxed{so}", metadata=row)
    assert await async_rm(SimpleNamespace(rm_type="boxed_ifbench", custom_rm_path=None), boxed) == 1.0
    with pytest.raises(CannotCheck, match="record 3: there is no instruction 'x:y'"):
        await async_rm(
            ARGS, Sample(prompt="p", response="r", metadata={"instruction_id_list": ["x:y"], "record_id": 3})
        )


@pytest.mark.full
def test_importing_it_fetches_and_loads_nothing_heavy():
    code = (
        "import socket, sys; socket.socket.connect = None; import miles.rollout.rm_hub.ifbench; "
        "print(sorted({'langdetect', 'nltk', 'textblob', 'syllapy', 'torch', 'git'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "[]\n"


def test_the_page_has_the_registry_s_tables():
    text = document.PAGE.read_text(encoding="utf-8")
    assert text == document.renewed(text), f"write them anew: python -m {document.__name__}"
    assert [name for name in (*BUILT, *REFUSED) if f"| `{name}` |" not in text] == []
