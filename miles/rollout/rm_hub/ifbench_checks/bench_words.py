"""IFBench: which words a response has (``words:``), and which its sentences (``sentence:``)."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise

from miles.rollout.rm_hub.ifbench_checks.arguments import Count, Place, Text
from miles.rollout.rm_hub.ifbench_checks.languages import begins_with_verb, syllables
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.words import (
    bare_words,
    plain_words,
    sentences,
    whole_words,
    word_tokens,
)

ifbench = partial(instruction, source="IFBench")
_CONSONANTS = frozenset("bcdfghjklmnpqrstvwxyz")
_TAGGED_CHARACTERS = 300


@ifbench("words:alphabet")
def alphabet(text: str) -> bool:
    """Each word begins with the letter after that of the word before; a comes after z."""
    letters = [ord(word[0]) - ord("a") for word in plain_words(text)]
    return _are_letters(letters) and all((one + 1) % 26 == other for one, other in pairwise(letters))


def _are_letters(places: list[int]) -> bool:
    return bool(places) and all(0 <= place < 26 for place in places)


@ifbench("words:vowel")
def vowels(text: str) -> bool:
    """One paragraph, with at most three of the vowels a, e, i, o, u."""
    return "\n" not in text.strip() and len(set(text.lower()).intersection("aeiou")) <= 3


@ifbench("words:consonants")
def consonant_clusters(text: str) -> bool:
    """Each word has two consonants one after the other; y is one."""
    words = plain_words(text)
    return bool(words) and all(any({one, two} <= _CONSONANTS for one, two in pairwise(word)) for word in words)


@ifbench("words:palindrome")
def palindromes(text: str) -> bool:
    """At least ten words of five letters or more are palindromes."""
    return sum(len(word) >= 5 and word == word[::-1] for word in plain_words(text)) >= 10


@ifbench("words:prime_lengths")
def prime_lengths(text: str) -> bool:
    """Each word's number of letters is prime."""
    words = plain_words(text)
    return bool(words) and all(map(_is_prime, {len(word) for word in words}))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@ifbench("words:start_verb", needs="textblob")
def starts_with_verb(text: str) -> bool:
    """The first word is a verb, as TextBlob's tagger finds."""
    first = next(iter(sentences(text[: 4 * _TAGGED_CHARACTERS])), "")
    return begins_with_verb(first[:_TAGGED_CHARACTERS])


@ifbench("words:repeats")
def repeats(text: str, *, small_n: Count) -> bool:
    """No word stands there more than small_n times."""
    return all(times <= small_n for times in Counter(plain_words(text)).values())


@ifbench("words:odd_even_syllables", needs="syllapy")
def odd_even_syllables(text: str) -> bool:
    """Words with an odd and an even number of syllables take turns; syllapy counts them."""
    return all(one != other for one, other in pairwise(syllables(word) % 2 for word in plain_words(text)))


@ifbench("words:last_first")
def last_first(text: str) -> bool:
    """Each sentence begins with the last word of the one before."""
    found = [[word.lower() for word in bare_words(sentence)] for sentence in sentences(text)]
    return all(one and other and one[-1] == other[0] for one, other in pairwise(found))


@ifbench("words:paragraph_last_first")
def paragraph_last_first(text: str) -> bool:
    """Each line ends with the word that it begins with."""
    lines = [[word.lower() for word in bare_words(line)] for line in text.split("\n")]
    return all(words[0] == words[-1] for words in lines if words)


@ifbench("words:no_consecutive")
def no_consecutive(text: str) -> bool:
    """No two words one after the other begin with the same letter."""
    return all(one[0] != other[0] for one, other in pairwise(plain_words(text)))


@ifbench("words:keywords_specific_position")
def keyword_at(text: str, *, keyword: Text, n: Place, m: Place) -> bool:
    """The m-th word of the n-th sentence is the keyword, in whatever case."""
    found = sentences(text)
    words = word_tokens(found[n - 1]) if n <= len(found) else []
    return m <= len(words) and words[m - 1].lower() == keyword.lower()


@ifbench("words:words_position")
def second_and_second_last(text: str, *, keyword: Text) -> bool:
    """The second word and the second to last word are the keyword, in whatever case."""
    words = [word.lower() for word in word_tokens(text)]
    return len(words) > 1 and words[1] == words[-2] == keyword.lower()


@ifbench("sentence:keyword")
def keyword_in_sentence(text: str, *, word: Text, N: Place) -> bool:  # noqa: N803
    """The N-th sentence has the word, in whatever case."""
    found = sentences(text)
    return len(found) >= N and whole_words(word, found[N - 1]) > 0


@ifbench("sentence:increment")
def sentence_increment(text: str, *, small_n: Count) -> bool:
    """Each sentence has exactly small_n words more than the one before."""
    lengths = [len(plain_words(sentence)) for sentence in sentences(text)]
    return all(other - one == small_n for one, other in pairwise(lengths))


@ifbench("sentence:alliteration_increment")
def alliteration_increment(text: str) -> bool:
    """In each sentence more words one after the other begin with the same letter than in the sentence before."""
    return all(one < other for one, other in pairwise(_longest_alliteration(found) for found in sentences(text)))


def _longest_alliteration(sentence: str) -> int:
    longest = run = 0
    for one, other in pairwise(plain_words(sentence)):
        run = max(run, 1) + 1 if one[0] == other[0] else 0
        longest = max(longest, run)
    return longest
