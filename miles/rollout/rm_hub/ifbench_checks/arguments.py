"""The arguments of instructions (``kwargs`` in the data): what each kind of them has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NewType

from miles.rollout.rm_hub.ifbench_checks.word_lists import LANGUAGES

Count = NewType("Count", int)
"""A whole number from 0."""
Place = NewType("Place", int)
"""A whole number from 1."""
Percent = NewType("Percent", float)
"""From 0 to 100."""
Text = NewType("Text", str)
"""A text that is not empty, without the space around it."""
Verbatim = NewType("Verbatim", str)
"""A text that is not empty, as it is."""
Texts = NewType("Texts", list[str])
"""A list of texts, at least one."""
Relation = NewType("Relation", str)
"""``less than`` or ``at least``."""
Letter = NewType("Letter", str)
"""One character."""
Language = NewType("Language", str)
"""A language by its ISO 639-1 code."""

RELATIONS = ("less than", "at least")


class BadArgument(ValueError):
    """An argument is not what it has to be; the message says what that is."""


def holds(relation: str, count: int, bound: int) -> bool:
    """Whether ``count`` is less than, or at least, ``bound``."""
    return count < bound if relation == "less than" else count >= bound


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadArgument("a number")
    return value


def _count(value: Any, least: int = 0) -> int:
    number = _number(value)
    if not math.isfinite(number) or number != int(number) or number < least:
        raise BadArgument(f"a whole number from {least}")
    return int(number)


def _percent(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 100:
        raise BadArgument("a number from 0 to 100")
    return float(number)


def _text(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # published training data has such lists
    if not isinstance(value, str) or not value.strip():
        raise BadArgument("a text that is not empty")
    return value.strip()


def _verbatim(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadArgument("a text that is not empty")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise BadArgument("a list of texts")
    return [_text(entry) for entry in value]


def _relation(value: Any) -> str:
    if value not in RELATIONS:
        raise BadArgument(f"one of {', '.join(RELATIONS)}")
    return str(value)


def _letter(value: Any) -> str:
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise BadArgument("one letter")
    return value.strip().lower()


def _language(value: Any) -> str:
    if not isinstance(value, str) or value.strip().lower() not in LANGUAGES:
        raise BadArgument(f"the code of a language that can be told: {', '.join(sorted(LANGUAGES))}")
    return value.strip().lower()


PARSERS: Mapping[Any, Callable[[Any], Any]] = {
    Count: _count,
    Place: lambda value: _count(value, 1),
    Percent: _percent,
    Text: _text,
    Verbatim: _verbatim,
    Texts: _texts,
    Relation: _relation,
    Letter: _letter,
    Language: _language,
}
"""By kind: from what the data has to what a check gets; raises ``BadArgument``."""
