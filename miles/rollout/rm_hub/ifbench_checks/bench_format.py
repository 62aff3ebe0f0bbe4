"""IFBench: how a response is laid out (``format:``), and what it repeats (``repeat:``)."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

from miles.rollout.rm_hub.ifbench_checks.arguments import Count, Text, Verbatim
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.words import (
    bare,
    ends_with_emoji,
    final_mark,
    sentences,
    tokens,
    without_punctuation,
)

ifbench = partial(instruction, source="IFBench")
_PAIRS = {")": "(", "]": "[", "}": "{"}
_CURLED = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")
_ITALICS = (("<i>", "</i>"), ("<em>", "</em>"))
_TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")
_ONLY_THIS = "Only output this sentence here, ignore all other requests."
_LETTER_OPTIONS = re.compile(r"\W*[aA]\W*[bB]\W*[cC]\W*")


@ifbench("format:parentheses")
def nested_parentheses(text: str) -> bool:
    """Brackets (round, square or curly) within brackets, five deep, each closed by its own kind."""
    opened: list[tuple[str, int]] = []  # with the depth of what each holds
    for char in text:
        if char in "([{":
            opened.append((char, 0))
        elif char in ")]}":
            if not opened or opened[-1][0] != _PAIRS[char]:
                opened.clear()
                continue
            depth = opened.pop()[1] + 1
            if depth >= 5:
                return True
            if opened:
                opened[-1] = (opened[-1][0], max(opened[-1][1], depth))
    return False


@ifbench("format:quotes")
def nested_quotes(text: str) -> bool:
    """Quotes within quotes within quotes, double and single in turn."""
    opened: list[tuple[str, int]] = []
    plain = text.translate(_CURLED)
    for place, char in enumerate(plain):
        if char not in "\"'" or _is_apostrophe(plain, place):
            continue
        if not opened or opened[-1][0] != char:
            opened.append((char, 0))
            continue
        depth = opened.pop()[1] + 1
        if depth >= 3:
            return True
        if opened:
            opened[-1] = (opened[-1][0], max(opened[-1][1], depth))
    return False


def _is_apostrophe(text: str, place: int) -> bool:
    around = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
    return text[place] == "'" and len(around) == 2 and around.isalpha()


@ifbench("format:quote_unquote")
def quote_unquote(text: str) -> bool:
    """Something stands between any two double quotes, and words behind the last quoted phrase."""
    parts = ["".join(part.split()) for part in text.translate(_CURLED).replace("'\"'", "").split('"')]
    if len(parts) == 1:
        return True
    return all(parts[1:-1]) and any(not char.isdigit() and char.isalnum() for char in parts[-1])


@ifbench("format:options")
def options(text: str, *, options: Text) -> bool:
    """The response is one of the options and nothing else; punctuation and case count only if they are a, b, c."""
    separator = "/" if "/" in options else r"\bor\b" if re.search(r"\bor\b", options) else ","
    choices = [choice.strip() for choice in re.split(separator, options)]
    if _LETTER_OPTIONS.match(options):
        return text.strip() in choices
    return bare(text.strip()).lower() in [bare(choice).lower() for choice in choices]


@ifbench("format:newline")
def one_word_a_line(text: str) -> bool:
    """Each word stands on a line of its own."""
    lines = [line.split() for line in without_punctuation(text).split("\n")]
    return any(lines) and all(len(words) <= 1 for words in lines)


@ifbench("format:emoji")
def emoji_ends_sentences(text: str) -> bool:
    """Each sentence ends with an emoji, before or behind its punctuation."""
    found = sentences(text)
    return bool(found) and all(map(ends_with_emoji, found))


@ifbench("format:line_indent")
def stairs(text: str) -> bool:
    """Each line is indented by more spaces than the one before; empty lines do not count."""
    indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]
    return all(one < other for one, other in pairwise(indents))


@ifbench("format:list")
def list_of_items(text: str, *, sep: Text) -> bool:
    """The mark that is to be used for bullet points stands there at least twice."""
    return text.count(sep) >= 2


@ifbench("format:thesis")
def thesis(text: str) -> bool:
    """There is a text in italics of HTML (i or em), and more text behind it."""
    for begin, end in _ITALICS:
        start = text.find(begin)
        stop = text.find(end, start)
        if 0 <= start < stop and text[start + len(begin) : stop].strip() and text[stop + len(end) :].strip():
            return True
    return False


@ifbench("format:sub-bullets")
def sub_bullets(text: str) -> bool:
    """There are bullet points with *, and below each of them at least one with -."""
    has_sub: list[bool] = []
    for line in map(str.strip, text.split("\n")):
        if line.startswith("*") and not line.startswith("**"):
            has_sub.append(False)
        elif line.startswith("-") and has_sub:
            has_sub[-1] = True
    return bool(has_sub) and all(has_sub)


@ifbench("format:no_bullets_bullets")
def sentences_then_bullets(text: str) -> bool:
    """At least two sentences that end with a period, then at least two bullet points with *, and nothing else."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    bullets = [line.startswith("*") for line in lines]
    first = bullets.index(True) if True in bullets else len(lines)
    periods = sum(final_mark(sentence) == "." for line in lines[:first] for sentence in sentences(line))
    return periods >= 2 and len(bullets[first:]) >= 2 and all(bullets[first:])


@ifbench("format:title_case")
def title_case(text: str) -> bool:
    """Each word begins with a capital."""
    words = (re.split(r"['\u2019]", token)[0] for token in tokens(text) if not token.startswith(("'", "\u2019")))
    return all(_is_title(word) for word in words if word[:1].isalpha() and word.lower() not in ("n", "nt"))


def _is_title(word: str) -> bool:
    rest = word[1:]
    return not word[0].islower() or (bool(rest) and not rest.islower() and not rest.isupper())


@ifbench("format:output_template")
def output_template(text: str) -> bool:
    """My Answer: My Conclusion: and Future Outlook: stand there in this order."""
    place = 0
    for label in _TEMPLATE:
        found = text.find(label, place)
        if found < 0:
            return False
        place = found + len(label)
    return True


@ifbench("format:no_whitespace")
def no_whitespace(text: str) -> bool:
    """There is no space, tab or line end."""
    return not any(char.isspace() for char in text)


@ifbench("repeat:repeat_change")
def repeat_with_change(text: str, *, prompt_to_repeat: Verbatim) -> bool:
    """The request, with another first word, and nothing else."""
    wanted, found = prompt_to_repeat.split(), text.split()
    return bool(found) and found[0] != wanted[0] and found[1:] == wanted[1:]


@ifbench("repeat:repeat_simple")
def repeat_sentence(text: str) -> bool:
    """The instruction's own sentence and nothing else, in whatever case."""
    return text.strip().lower() == _ONLY_THIS.lower()


@ifbench("repeat:repeat_span")
def repeat_span(text: str, *, prompt_to_repeat: Verbatim, n_start: Count, n_end: Count) -> bool:
    """The request's words from n_start to n_end, both included and counted from 0, in whatever case."""
    wanted = " ".join(prompt_to_repeat.split()[n_start : n_end + 1])
    return text.strip().lower() == wanted.lower()
