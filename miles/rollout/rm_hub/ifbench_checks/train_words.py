"""IFTrain, the instructions that IFBench's authors train with: keywords, letters, counts, first and last words."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

from miles.rollout.rm_hub.ifbench_checks.arguments import Count, Letter, Place, Relation, Text, holds
from miles.rollout.rm_hub.ifbench_checks.ifeval_shape import divided
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.words import (
    bare,
    bare_words,
    occurrences,
    sentences,
    tokens,
    whole_words,
    word_tokens,
)

iftrain = partial(instruction, source="IFTrain")


@iftrain("keywords:word_once")
def word_once(text: str, *, keyword: Text) -> bool:
    """The keyword occurs exactly once, in whatever case, also inside of words."""
    return occurrences(keyword, text) == 1


@iftrain("keywords:word_count_different_numbers")
def word_count(text: str, *, keyword: Text, frequency: Count, relation: Relation) -> bool:
    """The keyword occurs less than, or at least, so many times, also inside of words."""
    return holds(relation, occurrences(keyword, text), frequency)


@iftrain("keywords:exclude_word_harder")
def lacks_word(text: str, *, keyword: Text) -> bool:
    """The keyword does not stand there by itself, in whatever case."""
    return not whole_words(keyword, text)


@iftrain("keywords:no_adjacent_consecutive")
def no_adjacent_letters(text: str) -> bool:
    """No word begins with the letter that follows, in the alphabet, that of the word before."""
    letters = [ord(word[0].lower()[0]) for word in text.split()]
    return all(other - one != 1 for one, other in pairwise(letters))


@iftrain("keywords:palindrome")
def palindrome(text: str) -> bool:
    """A word of three letters or more is a palindrome."""
    words = (word.lower() for word in bare_words(text))
    return any(len(word) > 2 and word == word[::-1] for word in words)


@iftrain("keywords:keyword_specific_position")
def keyword_at(text: str, *, keyword: Text, n: Place, m: Place) -> bool:
    """The m-th word of the n-th sentence is the keyword; punctuation marks count as words."""
    found = sentences(text)
    words = tokens(found[n - 1]) if n <= len(found) else []
    return m <= len(words) and words[m - 1] == keyword


@iftrain("keywords:start_end")
def same_start_and_end(text: str) -> bool:
    """The response begins and ends with the same word, in whatever case; nothing stands behind it."""
    found = tokens(text)
    return len(found) > 1 and found[0].lower() == found[-1].lower()


@iftrain("first_word:first_word_answer")
def first_word(text: str, *, first_word: Text) -> bool:
    """The first word is this one, in whatever case."""
    return _begins(text, first_word)


@iftrain("first_word:first_word_sent")
def first_word_of_sentences(text: str, *, first_word: Text) -> bool:
    """Each sentence begins with the word, in whatever case."""
    found = sentences(text)
    return bool(found) and all(_begins(sentence, first_word) for sentence in found)


def _begins(text: str, word: str) -> bool:
    words = text.split(maxsplit=1)
    return bool(words) and word.lower() in (words[0].lower(), bare(words[0]).lower())


@iftrain("last_word:last_word_answer")
def last_word(text: str, *, last_word: Text) -> bool:
    """The last word, punctuation left out, is this one, in whatever case."""
    return _ends(text, last_word)


@iftrain("last_word:last_word_sent")
def last_word_of_sentences(text: str, *, last_word: Text) -> bool:
    """Each sentence ends with the word before its punctuation, in whatever case."""
    found = sentences(text)
    return bool(found) and all(_ends(sentence, last_word) for sentence in found)


def _ends(text: str, word: str) -> bool:
    words = bare_words(text)
    return bool(words) and words[-1].lower() == bare(word).lower()


@iftrain("count:lowercase_counting")
def few_small_words(text: str, *, N: Count) -> bool:  # noqa: N803
    """At most N words are in small letters."""
    return sum(1 for _ in re.finditer(r"\b[a-z]+\b", text)) <= N


@iftrain("count:count_unique")
def all_unique(text: str) -> bool:
    """No word stands there twice."""
    words = [word.lower() for word in word_tokens(text)]
    return len(words) == len(set(words))


@iftrain("count:count_increment_word")
def once_and_twice(text: str, *, keyword1: Text, keyword2: Text) -> bool:
    """The first keyword occurs once, the second twice, also inside of words."""
    return occurrences(keyword1, text) == 1 and occurrences(keyword2, text) == 2


@iftrain("count:counting_composition")
def composition(text: str, *, n_sent: Count, n_words: Count) -> bool:
    """Three paragraphs with * * * between them, each of n_sent sentences of n_words words."""
    found = text.replace("* * *", "***")
    paragraphs = [sentences(part) for part in found.split("***") if part.strip()]
    return divided(found, "***") == 3 and all(
        len(part) == n_sent and all(len(word_tokens(sentence)) == n_words for sentence in part) for part in paragraphs
    )


@iftrain("letters:letter_counting")
def number_of_letters(text: str, *, N: Count, relation: Relation) -> bool:  # noqa: N803
    """Less than, or at least, N letters from a to z, small or capital."""
    return holds(relation, sum(char.isascii() and char.isalpha() for char in text), N)


@iftrain("letters:letter_counting2")
def number_of_one_letter(text: str, *, letter: Letter, let_frequency: Count, let_relation: Relation) -> bool:
    """The letter, small or capital, occurs less than, or at least, so many times."""
    return holds(let_relation, text.lower().count(letter), let_frequency)
