"""Words, sentences and paragraphs of a response, as the checks of instructions count them.

Every function takes time in proportion to the text, whatever the text is.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache

from miles.rollout.rm_hub.ifbench_checks.word_lists import (
    ABBREVIATIONS,
    BEFORE_NAMES,
    BEFORE_NUMBERS,
    SENTENCE_STARTERS,
)

DASHES = "\u2012\u2013\u2014\u2015"
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0903\u093a-\u094f\u0981-\u0dff\u0e31-\u0e4e"
_W = rf"[\w{_MARKS}]"
_TOKEN = re.compile(rf"{_W}+(?:(?:[-'\u2019.]|(?<=\d)[,:](?=\d)){_W}+)*|\.{{2,}}|[^\w\s{_MARKS}]")
_CONTRACTION = re.compile(r"(.+?)(n['\u2019]t|['\u2019](?:s|re|ve|ll|d|m))", re.IGNORECASE)
_EMOJI_CHARS = (
    r"\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u23cf\u23e9-\u23f3\u23f8-\u23fa"
    r"\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030"
    r"\u303d\u3297\u3299\U0001f000-\U0001faff"
)
_JOINERS = r"\ufe0e\ufe0f\u200d\u20e3\U000e0020-\U000e007f"
_EMOJI = re.compile(f"[{_EMOJI_CHARS}]")
_EMOJI_RUN = re.compile(rf"\s*[{_EMOJI_CHARS}][{_EMOJI_CHARS}{_JOINERS}]*")
_ENDER = re.compile(r"[.!?\u2026]+|[\u3002\uff01\uff1f]+")
_CLOSERS = "\"'\u201d\u2019\u00bb)]*_`"
_WIDE_MARKS = {"\u3002": ".", "\uff01": "!", "\uff1f": "?"}
_QUOTES = "\"'\u201d\u2019\u00bb"


@lru_cache(maxsize=1)
def _punctuation() -> dict[int, str | None]:
    """Punctuation goes, long dashes become spaces."""
    table: dict[int, str | None] = {}
    for code in (*range(0x21, 0x3100), *range(0xFE10, min(0x10000, sys.maxunicode))):
        if unicodedata.category(chr(code)).startswith("P") or chr(code) in "$+<=>^`|~":
            table[code] = " " if chr(code) in DASHES else None
    return table


def without_punctuation(text: str) -> str:
    """The text without punctuation, also that inside of words; words with a long dash between them stay two."""
    return text.translate(_punctuation())


def plain_words(text: str) -> list[str]:
    """Words in small letters, without punctuation: ``Don't stop!`` is dont, stop."""
    return without_punctuation(text).lower().split()


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    start, end = 0, len(word)
    table = _punctuation()
    while start < end and ord(word[start]) in table:
        start += 1
    while end > start and ord(word[end - 1]) in table:
        end -= 1
    return word[start:end]


def bare_words(text: str) -> list[str]:
    """Words between spaces, without the punctuation around them."""
    return [word for word in map(bare, text.split()) if word]


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: ``don't`` is two."""
    return sum(1 for _ in re.finditer(r"\w+", text))


def tokens(text: str) -> list[str]:
    """Words and punctuation marks. Contractions are two (``do`` and ``n't``), words with hyphens one."""
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        parts = _CONTRACTION.fullmatch(token) if "'" in token or "\u2019" in token else None
        found += parts.groups() if parts else (token,)
    return found


def word_tokens(text: str) -> list[str]:
    """``tokens`` without those that are punctuation only."""
    return [token for token in tokens(text) if any(char.isalnum() for char in token)]


def sentences(text: str) -> list[str]:
    """Sentences with their punctuation, without the space around them.

    A sentence ends behind ``.``, ``!``, ``?`` or an ellipsis with its closing quotes and brackets, and an emoji behind
    those; not behind abbreviations, initials, numbers of a list, and not at the end of a line. What comes after the
    last end is a sentence, too.
    """
    found = []
    start = position = 0
    while match := _ENDER.search(text, position):
        position = _past_closers(text, match.end())
        if not _ends_sentence(text, match, position):
            continue
        if emoji := _EMOJI_RUN.match(text, position):
            position = emoji.end()
        if sentence := text[start:position].strip():
            found.append(sentence)
        start = position
    if rest := text[start:].strip():
        found.append(rest)
    return found


def _past_closers(text: str, position: int) -> int:
    while position < len(text) and text[position] in _CLOSERS:
        position += 1
    return position


def _ends_sentence(text: str, ender: re.Match[str], end: int) -> bool:
    if ender.group()[0] in _WIDE_MARKS:
        return True
    if end < len(text) and not text[end].isspace() and not is_emoji(text[end]):
        return False
    following = text[end : end + 80].lstrip()[:1]
    closed_quote = any(char in _QUOTES for char in text[ender.end() : end])
    if closed_quote and following.islower():
        return False
    mark = ender.group()
    if mark != ".":
        return not (following.islower() and mark.strip(".\u2026") == "")
    return not following or _ends_with_dot(text, ender.start(), following, text[end : end + 80])


def _ends_with_dot(text: str, dot: int, following: str, rest: str) -> bool:
    """Whether a single dot, behind which there is more text, ends a sentence."""
    begin = dot
    while begin > 0 and dot - begin < 40 and not text[begin - 1].isspace():
        begin -= 1
    word = text[begin:dot].lstrip("(\"'[\u201c\u2018*_")
    line = text.rfind("\n", max(0, begin - 8), begin)
    at_line_begin = not text[line + 1 if line >= 0 else max(0, begin - 8) : begin].strip()
    if at_line_begin and (word.isdigit() or (len(word) == 1 and word.isalpha() and word != "I")) and len(word) < 4:
        return False
    small = word.lower()
    if small in BEFORE_NUMBERS:
        return not following.isdigit()
    if small in ABBREVIATIONS or re.fullmatch(r"(?:[A-Za-z]\.){1,8}[A-Za-z]", word):
        return small not in BEFORE_NAMES and _first(rest) in SENTENCE_STARTERS
    if len(word) == 1 and word.isupper() and word != "I":
        return not following.isupper() or _first(rest) in SENTENCE_STARTERS
    return True


def _first(rest: str) -> str:
    words = rest.split(maxsplit=1)
    return bare(words[0]) if words else ""


def final_mark(sentence: str) -> str:
    """The character that ends a sentence, quotes, brackets and emojis left out; empty: there is none."""
    end = len(sentence)
    while end and (sentence[end - 1] in _CLOSERS or sentence[end - 1].isspace() or is_emoji(sentence[end - 1])):
        end -= 1
    mark = sentence[end - 1 : end] if end else ""
    return _WIDE_MARKS.get(mark, mark)


def is_emoji(char: str) -> bool:
    """Whether a character is an emoji, or belongs to one."""
    return bool(_EMOJI.match(char)) or bool(re.match(f"[{_JOINERS}]", char))


def ends_with_emoji(sentence: str) -> bool:
    """Whether a sentence's last character, punctuation left out, is an emoji."""
    end = len(sentence)
    table = _punctuation()
    while end:
        char = sentence[end - 1]
        if is_emoji(char):
            return True
        if not char.isspace() and ord(char) not in table:
            return False
        end -= 1
    return False


def whole_words(word: str, text: str) -> int:
    """How often a word, or several, stands in a text by itself, in whatever case."""
    return sum(1 for _ in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def occurrences(part: str, text: str) -> int:
    """How often a text has some part, also inside of words, in whatever case."""
    return sum(1 for _ in re.finditer(re.escape(part), text, re.IGNORECASE))
