"""IFBench: what is counted (``count:``), and in which proportion it stands (``ratio:``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from miles.rollout.rm_hub.ifbench_checks.arguments import Count, Percent, Place, Text
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.word_lists import CONJUNCTIONS, PERSON_NAMES, PRONOUNS, STOP_WORDS
from miles.rollout.rm_hub.ifbench_checks.words import (
    bare_words,
    count_words,
    final_mark,
    plain_words,
    sentences,
    tokens,
    whole_words,
    without_punctuation,
)

ifbench = partial(instruction, source="IFBench")
_JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f]")
_INTERROBANGS = ("?!", "!?", "\u203d")
_MARKS = ".,!?;:"


@ifbench("count:word_count_range")
def word_count_range(text: str, *, min_words: Count, max_words: Count) -> bool:
    """From min_words to max_words words, both included."""
    return min_words <= count_words(text) <= max_words


@ifbench("count:unique_word_count")
def unique_words(text: str, *, N: Count) -> bool:  # noqa: N803
    """At least N different words, whatever their case."""
    return len({word.lower() for word in bare_words(text)}) >= N


@ifbench("count:conjunctions")
def conjunctions(text: str, *, small_n: Count) -> bool:
    """At least small_n different coordinating conjunctions: and, but, for, nor, or, so, yet."""
    return len(CONJUNCTIONS.intersection(word.lower() for word in bare_words(text))) >= small_n


@ifbench("count:person_names")
def person_names(text: str, *, N: Count) -> bool:  # noqa: N803
    """At least N different names of the list of 50 that the instruction gives (Emma, Liam, Sophia, ...)."""
    return len(PERSON_NAMES.intersection(re.findall(r"\w+", text))) >= N


@ifbench("count:numbers")
def numbers(text: str, *, N: Count) -> bool:  # noqa: N803
    """Exactly N numbers in digits; 1,000.5 is one."""
    return sum(1 for _ in re.finditer(r"\d+", without_punctuation(text))) == N


@ifbench("count:punctuation")
def punctuation(text: str) -> bool:
    """Each of . , ! ? ; : at least once, and besides them an interrobang: ?!, !? or its own character."""
    first = min((place for mark in _INTERROBANGS if (place := text.find(mark)) >= 0), default=None)
    if first is None:
        return False
    length = 1 if text[first] == "\u203d" else 2
    rest = text[:first] + text[first + length :]
    return all(mark in rest for mark in _MARKS)


@ifbench("count:words_japanese")
def words_japanese(text: str, *, N: Place) -> bool:  # noqa: N803
    """Every N-th word, counted between spaces, has a Japanese character; numbers and punctuation need none."""
    words = text.split()[N - 1 :: N]
    return all(_JAPANESE.search(word) for word in words if not _is_number(word))


def _is_number(word: str) -> bool:
    found = without_punctuation(word).strip()
    return not found or found.isdigit()


@ifbench("count:pronouns")
def pronouns(text: str, *, N: Count) -> bool:  # noqa: N803
    """At least N pronouns of English: personal, possessive, reflexive, demonstrative, interrogative, indefinite."""
    return sum(token in PRONOUNS for token in tokens(text.replace("/", " ").lower())) >= N


@ifbench("count:keywords_multiple")
def keywords_multiple(
    text: str, *, keyword1: Text, keyword2: Text, keyword3: Text, keyword4: Text, keyword5: Text
) -> bool:
    """The five keywords stand there exactly once, twice, three, five and seven times, in whatever case."""
    wanted = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(whole_words(keyword, text) == times for keyword, times in wanted)


@ifbench("ratio:stop_words")
def stop_words(text: str, *, percentage: Percent) -> bool:
    """At most so many percent of the words are stop words of English."""
    words = re.findall(r"\w+", text.lower())
    return bool(words) and 100 * sum(word in STOP_WORDS for word in words) <= percentage * len(words)


@ifbench("ratio:overlap")
def overlap(text: str, *, reference_text: Text, percentage: Percent) -> bool:
    """So many percent, give or take 2, of the response's different trigrams of words stand in the reference text."""
    own, others = _trigrams(tokens(text)), _trigrams(tokens(reference_text))
    return bool(own) and abs(100 * len(own & others) / len(own) - percentage) <= 2


def _trigrams(words: list[str]) -> set[tuple[str, str, str]]:
    return set(zip(words, words[1:], words[2:], strict=False))


@ifbench("ratio:sentence_type")
def sentence_type(text: str) -> bool:
    """Twice as many sentences end with a period as with a question mark, which at least one does."""
    periods, questions, _ = _types(sentences(text))
    return periods == 2 * questions > 0


@ifbench("ratio:sentence_balance")
def sentence_balance(text: str) -> bool:
    """As many sentences end with a period as with a question mark and with an exclamation mark: at least one."""
    periods, questions, exclamations = _types(sentences(text))
    return periods == questions == exclamations > 0


def _types(found: Iterable[str]) -> tuple[int, int, int]:
    marks = [final_mark(sentence) for sentence in found]
    return marks.count("."), marks.count("?"), marks.count("!")


@ifbench("ratio:sentence_words")
def sentence_words(text: str) -> bool:
    """Three sentences of the same number of characters, and no word twice."""
    found = sentences(text)
    words = plain_words(text)
    return len(found) == 3 and len({len(sentence) for sentence in found}) == 1 and len(set(words)) == len(words)
