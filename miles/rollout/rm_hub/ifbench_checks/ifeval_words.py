"""IFEval: keywords, letters, language, case, punctuation, begin and end."""

from __future__ import annotations

from functools import partial

from miles.rollout.rm_hub.ifbench_checks.arguments import (
    Count,
    Language,
    Letter,
    Relation,
    Text,
    Texts,
    Verbatim,
    holds,
)
from miles.rollout.rm_hub.ifbench_checks.languages import is_language
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.words import occurrences, tokens, whole_words

ifeval = partial(instruction, source="IFEval")


@ifeval("keywords:existence")
def has_keywords(text: str, *, keywords: Texts) -> bool:
    """Each keyword occurs, in whatever case, also inside of words."""
    return all(occurrences(keyword, text) for keyword in keywords)


@ifeval("keywords:frequency")
def keyword_frequency(text: str, *, keyword: Text, frequency: Count, relation: Relation) -> bool:
    """The keyword occurs less than, or at least, so many times, also inside of words."""
    return holds(relation, occurrences(keyword, text), frequency)


@ifeval("keywords:forbidden_words")
def lacks_words(text: str, *, forbidden_words: Texts) -> bool:
    """None of the words occurs by itself, in whatever case."""
    return not any(whole_words(word, text) for word in forbidden_words)


@ifeval("keywords:letter_frequency")
def letter_frequency(text: str, *, letter: Letter, let_frequency: Count, let_relation: Relation) -> bool:
    """The letter, small or capital, occurs less than, or at least, so many times."""
    return holds(let_relation, text.lower().count(letter), let_frequency)


@ifeval("language:response_language", needs="langdetect")
def response_language(text: str, *, language: Language) -> bool:
    """The response is in the language, as langdetect finds; one without words is."""
    return is_language(text, language)


@ifeval("change_case:english_capital", needs="langdetect")
def english_capitals(text: str) -> bool:
    """English, and no small letter."""
    return text.isupper() and is_language(text, "en")


@ifeval("change_case:english_lowercase", needs="langdetect")
def english_small(text: str) -> bool:
    """English, and no capital letter."""
    return text.islower() and is_language(text, "en")


@ifeval("change_case:capital_word_frequency")
def capital_words(text: str, *, capital_frequency: Count, capital_relation: Relation) -> bool:
    """Less than, or at least, so many words are in capitals; words with hyphens count as one."""
    return holds(capital_relation, sum(token.isupper() for token in tokens(text)), capital_frequency)


@ifeval("punctuation:no_comma")
def no_comma(text: str) -> bool:
    """There is no comma."""
    return "," not in text


@ifeval("startend:end_checker")
def ends_with(text: str, *, end_phrase: Text) -> bool:
    """The response ends with the phrase, in whatever case; a double quote may follow."""
    return text.strip().strip('"').lower().endswith(end_phrase.lower())


@ifeval("startend:quotation")
def is_quoted(text: str) -> bool:
    """The whole response stands in double quotes."""
    found = text.strip()
    return len(found) > 1 and found[0] == found[-1] == '"'


@ifeval("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different answers with six asterisks between them."""
    answers = [part.strip() for part in text.split("******")]
    if not all(answers[1:-1]):
        return False
    answers = [answer for answer in answers if answer]
    return len(answers) == 2 and answers[0] != answers[1]


@ifeval("combination:repeat_prompt")
def repeats_prompt(text: str, *, prompt_to_repeat: Verbatim) -> bool:
    """The response begins with the request, word for word, in whatever case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())
