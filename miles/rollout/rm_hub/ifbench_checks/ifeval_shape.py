"""IFEval: how long a response is, what it contains, how it is laid out."""

from __future__ import annotations

import json
import re
from functools import partial

from miles.rollout.rm_hub.ifbench_checks.arguments import Count, Place, Relation, Text, holds
from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.words import bare, count_words, sentences

ifeval = partial(instruction, source="IFEval")
CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")
_HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")
_FENCES = ("```json", "```Json", "```JSON", "```")
_POSTSCRIPTS = {"p.s.": r"p\.\s?s\.", "p.p.s": r"p\.\s?p\.\s?s", "p.p.s.": r"p\.\s?p\.\s?s\."}


@ifeval("length_constraints:number_words")
def number_of_words(text: str, *, num_words: Count, relation: Relation) -> bool:
    """Less than, or at least, so many words."""
    return holds(relation, count_words(text), num_words)


@ifeval("length_constraints:number_sentences")
def number_of_sentences(text: str, *, num_sentences: Count, relation: Relation) -> bool:
    """Less than, or at least, so many sentences."""
    return holds(relation, len(sentences(text)), num_sentences)


@ifeval("length_constraints:number_paragraphs")
def number_of_paragraphs(text: str, *, num_paragraphs: Count) -> bool:
    """So many paragraphs with three asterisks between them; none between two of those is empty."""
    return divided(text, "***") == num_paragraphs


def divided(text: str, divider: str) -> int | None:
    """How many parts a divider makes; empty ones at the ends do not count. None: another one is empty."""
    parts = [bool(part.strip()) for part in text.split(divider)]
    return sum(parts) if all(parts[1:-1]) else None


@ifeval("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(text: str, *, num_paragraphs: Count, nth_paragraph: Place, first_word: Text) -> bool:
    """So many paragraphs with an empty line between them; the n-th begins with the word, in whatever case."""
    paragraphs = [part.split() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    begin = re.split(r"[.,?!'\"]", bare(paragraphs[nth_paragraph - 1][0]), maxsplit=1)[0]
    return first_word.lower() in (begin.lower(), bare(paragraphs[nth_paragraph - 1][0]).lower())


@ifeval("detectable_content:number_placeholders")
def number_of_placeholders(text: str, *, num_placeholders: Count) -> bool:
    """At least so many placeholders in square brackets, such as [address]."""
    return sum(1 for _ in _PLACEHOLDER.finditer(text)) >= num_placeholders


@ifeval("detectable_content:postscript")
def has_postscript(text: str, *, postscript_marker: Text) -> bool:
    """There is a postscript that begins with the marker, in whatever case."""
    marker = postscript_marker.lower()
    return re.search(_POSTSCRIPTS.get(marker, re.escape(marker)), text.lower()) is not None


@ifeval("detectable_format:number_bullet_lists")
def number_of_bullets(text: str, *, num_bullets: Count) -> bool:
    """Exactly so many bullet points of Markdown, with * or -."""
    return sum(map(_is_bullet, text.split("\n"))) == num_bullets


def _is_bullet(line: str) -> bool:
    found = line.strip()
    if not found.strip("*- "):  # a rule, or nothing
        return found in ("*", "-")
    return found.startswith("-") or (found.startswith("*") and not found.startswith("**"))


@ifeval("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """One of: My answer is yes. My answer is no. My answer is maybe."""
    return any(answer in text for answer in CONSTRAINED_ANSWERS)


@ifeval("detectable_format:number_highlighted_sections")
def number_of_highlights(text: str, *, num_highlights: Count) -> bool:
    """At least so many parts highlighted by Markdown: *so* or **so**."""
    return sum(1 for found in _HIGHLIGHT.finditer(text) if found.group().strip("* ")) >= num_highlights


@ifeval("detectable_format:multiple_sections")
def number_of_sections(text: str, *, section_spliter: Text, num_sections: Count) -> bool:
    """At least so many sections, each headed by the word and a number."""
    return sum(1 for _ in re.finditer(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


@ifeval("detectable_format:json_format")
def is_json(text: str) -> bool:
    """The whole response is JSON; a code block may be around it."""
    found = text.strip()
    for fence in _FENCES:
        if found.startswith(fence):
            found = found[len(fence) :]
            break
    try:
        json.loads(found.removesuffix("```").strip(), parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


@ifeval("detectable_format:title")
def has_title(text: str) -> bool:
    """There is a title in double angular brackets, such as <<poem of joy>>."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].strip("<> "):
            return True
    return False
