"""The ``gpqa`` reward: whether a response chose the right one of several options, named by letter or by its text."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_LETTERS = tuple(string.ascii_uppercase[:8])
THOUGHTS_END = "</think>"

_MARKS = r"[\s*_$({\[\"']{0,8}+(?:\\(?:text|mathbf|mathrm|textbf|boxed)\{[\s*(]{0,3}+)?"
"""What may stand before a letter: brackets, emphasis, a command of TeX."""
_END = r"(?![\w.]?\w|'\w)"
_LETTER = rf"(?-i:(?P<letter>[A-Z]|[b-z]|a(?!\s+\w))){_END}"
"""By itself. A small ``a`` before another word is an article."""
_STATED = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:answer|option|choice)\b[\s*_]{{0,8}}+(?:(?:is|:)[\s*_:]{{0,8}}+)?{_MARKS}{_LETTER}",
        rf"(?<!\w)(?<!\w')(?P<letter>[A-Z]){_END}[\s*_)\]}}.\"']{{0,8}}+is\s{{1,8}}+(?:the\s{{1,8}}+)?correct\b",
        rf"\bfinal\s{{1,8}}+(?:answer|option|choice)\b[\s*_]{{0,8}}+(?:(?:is|:)[\s*_:]{{0,8}}+)?{_MARKS}{_LETTER}",
    )
)
_ALONE = re.compile(r"(?<!\w)(?<!\w')[A-Z](?!\w|'\w)")


@dataclass(frozen=True)
class Question:
    """What the data says of a question.

    Attributes:
        letters: That answers may have.
        choices: Texts of the options, by letter; empty if the data has none.
        correct: The right letter; None if only texts are known.
        texts: Texts of the right answer.
    """

    letters: tuple[str, ...]
    choices: tuple[str, ...]
    correct: str | None
    texts: tuple[str, ...]


def compute_gpqa_reward(response: str | None, label: object, metadata: Mapping[str, Any] | None = None) -> float:
    """1.0 if the response chose the right option, else 0.0.

    Args:
        response: Thoughts up to the last ``</think>`` do not count.
        label: The right letter, its index (an int), or its text.
        metadata: May have ``choices``, ``valid_letters``, ``correct_letter``, ``correct_answer``, ``answer_text``.
    """
    if response is None:
        return 0.0
    question = read_question(label, metadata or {})
    said = response.rpartition(THOUGHTS_END)[2]
    letter = chosen_letter(said, question.letters)
    if letter is not None and question.correct is not None:
        return float(letter == question.correct)
    words = plain_words(said)
    targets = (plain_words(text) for text in question.texts)
    return float(any(target in words for target in targets if target))


def read_question(label: object, metadata: Mapping[str, Any]) -> Question:
    """What label and metadata say of a question."""
    given = metadata.get("choices")
    options = list(given.values()) if isinstance(given, Mapping) else _listed(given)
    choices = tuple(str(choice) for choice in options)
    letters = _letters(metadata.get("valid_letters"), len(choices))
    correct = _correct_letter(label, metadata, letters, choices)
    texts = [choices[letters.index(correct)]] if correct in letters[: len(choices)] else []
    texts += [str(metadata[key]) for key in ("correct_answer", "answer_text") if metadata.get(key) is not None]
    if label is not None and not _is_index(label, letters) and str(label).strip().upper() not in letters:
        texts.append(str(label))
    return Question(letters, choices, correct, tuple(texts))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def _letters(valid: Any, count: int) -> tuple[str, ...]:
    if valid:
        return tuple(str(letter).strip().upper() for letter in valid)
    return tuple(string.ascii_uppercase[:count]) if count else DEFAULT_LETTERS


def _is_index(label: object, letters: Sequence[str]) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(letters)


def _correct_letter(
    label: object, metadata: Mapping[str, Any], letters: Sequence[str], choices: Sequence[str]
) -> str | None:
    named = metadata.get("correct_letter")
    if named is not None and str(named).strip():
        return str(named).strip().upper()
    if isinstance(label, int) and _is_index(label, letters):
        return letters[label]
    text = "" if label is None else str(label).strip()
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    wanted = plain_words(text)
    if wanted:
        for letter, choice in zip(letters, choices, strict=False):
            if plain_words(choice) == wanted:
                return letter
    return None


def chosen_letter(response: str, letters: Sequence[str]) -> str | None:
    """The letter that a response states as its answer, or else the last valid capital that stands alone."""
    for pattern in _STATED:
        for match in pattern.finditer(response):
            if match["letter"].upper() in letters:
                return match["letter"].upper()
    alone = [letter for letter in _ALONE.findall(response) if letter in letters]
    return alone[-1] if alone else None


def plain_words(text: str) -> str:
    """Lower case, with one space for everything that is neither letter nor digit."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())
