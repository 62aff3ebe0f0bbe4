"""IFTrain: copies of the request, paragraphs, brackets, hyphens, punctuation."""

from __future__ import annotations

import re
from functools import partial

from miles.rollout.rm_hub.ifbench_checks.arguments import Count, Place, Text, Verbatim
from miles.rollout.rm_hub.ifbench_checks.ifeval_shape import divided
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.words import bare_words, sentences

iftrain = partial(instruction, source="IFTrain")


@iftrain("copy:copy")
@iftrain("copy:copying_simple")
def copies(text: str, *, prompt_to_repeat: Verbatim) -> bool:
    """The request, word for word, and nothing else, in whatever case."""
    return _same(text, prompt_to_repeat)


def _same(one: str, other: str) -> bool:
    return one.strip().lower() == other.strip().lower()


@iftrain("copy:copying_multiple")
def copies_often(text: str, *, prompt_to_repeat: Verbatim, N: Place) -> bool:  # noqa: N803
    """The request N times with six asterisks between, and nothing else, in whatever case."""
    parts = text.split("******")
    return len(parts) == N and all(_same(part, prompt_to_repeat) for part in parts)


@iftrain("new:copy_span_idx")
def copies_span(text: str, *, prompt_to_repeat: Verbatim, n_start: Count, n_end: Count) -> bool:
    """The request's characters from n_start to n_end, counted from 0, in whatever case; with or without the last."""
    return any(_same(text, prompt_to_repeat[n_start:end]) for end in (n_end, n_end + 1))


@iftrain("copy:repeat_phrase")
def repeats_phrase(text: str, *, phrase: Text, small_n: Count) -> bool:
    """The phrase stands there so many times, each time with another word somewhere in its middle."""
    wanted = bare_words(phrase)
    words = bare_words(text)
    found = 0
    for place in range(len(words) - len(wanted) + 1):
        if len(wanted) < 3 or words[place] != wanted[0] or words[place + len(wanted) - 1] != wanted[-1]:
            continue
        window = words[place : place + len(wanted)]
        found += sum(one != other for one, other in zip(window, wanted, strict=True)) == 1
    return found == small_n > 0


@iftrain("paragraphs:paragraphs")
def two_divided_paragraphs(text: str) -> bool:
    """Two paragraphs with three asterisks between them."""
    return divided(text, "***") == 2


@iftrain("paragraphs:paragraphs2")
def two_paragraphs(text: str) -> bool:
    """Two paragraphs with one empty line between them."""
    return divided(text, "\n\n") == 2


@iftrain("detectable_format:sentence_hyphens")
def hyphenated_sentences(text: str) -> bool:
    """Hyphens without spaces connect the sentences."""
    found = text.strip()
    parts = sentences(re.sub(r"(?<=[.!?])-", " ", found))
    return "-".join(parts) == found


@iftrain("detectable_format:square_brackets")
def bracketed_words(text: str) -> bool:
    """Each word stands in square brackets."""
    words = text.split()
    return bool(words) and all(len(word) > 2 and word[0] == "[" and word[-1] == "]" for word in words)


@iftrain("detectable_format:bigram_wrapping")
def wrapped_bigrams(text: str) -> bool:
    """Each two words stand in double angular brackets: <<I am>> <<at home>>."""
    words = text.split()
    pairs = [f"{one} {other}" for one, other in zip(words[::2], words[1::2], strict=False)]
    return bool(pairs) and all(pair.startswith("<<") and pair.endswith(">>") and ">> <<" not in pair for pair in pairs)


@iftrain("punctuation:punctuation_dot")
def no_dot(text: str) -> bool:
    """There is no dot."""
    return "." not in text


@iftrain("punctuation:punctuation_exclamation")
def no_exclamation(text: str) -> bool:
    """There is no exclamation mark."""
    return "!" not in text
