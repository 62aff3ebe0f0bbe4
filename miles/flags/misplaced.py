"""What argparse gives up at: told as a problem, and taken out of the words so that the rest can be read. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles.flags.flag import TAKES_NO_VALUE
from miles.flags.problems import Problem
from miles.flags.table import Table

_ARGUMENT = re.compile(r"argument ([^:]+): (.*)", re.DOTALL)


def taken_out(message: str, words: Sequence[str], table: Table) -> tuple[Problem, list[str]]:
    """The problem of argparse's message, and the words without what it is about: all of them if that cannot be told."""
    match = _ARGUMENT.match(message)
    if match is None:
        advice = "Put the values that a flag takes right after it; --help names them."
        return Problem("the command line", "", message, "", advice), list(words)
    names, what = match[1].split("/"), match[2]
    flag = table.by_name.get(names[0])
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in names:
            continue
        if equals and flag is not None and flag.kind in TAKES_NO_VALUE:
            return Problem(name, value, "takes no value", "", _without_value(names, value)), _but(words, place, 1)
        following = words[place + 1] if place + 1 < len(words) else "--"
        if not equals and what.startswith("expected") and following.startswith("-"):
            is_value = not following.startswith("--")
            advice = (
                f"Write {name}={following}: a value that begins with - is tied to its flag."
                if is_value
                else f"Put what it takes right after it, or leave {name} out; --help names it."
            )
            return Problem(name, "", what, "", advice), _but(words, place, 2 if is_value else 1)
    typed = next((name for word in words if (name := word.partition("=")[0]) in names), names[0])
    return Problem(typed, "", what, "", "Put the values that the flag takes right after it; --help names them."), list(
        words
    )


def _without_value(names: Sequence[str], value: str) -> str:
    off = next((name for name in names if name.startswith("--no-")), "")
    if value.lower() in ("false", "0", "no", "off"):
        return f"Write {off}." if off else f"Leave out ={value} to turn it on, or all of it to leave it off."
    return f"Leave out ={value}."


def _but(words: Sequence[str], place: int, count: int) -> list[str]:
    return [*words[:place], *words[place + count :]]


def unknown_words(unknown: Sequence[str], words: Sequence[str], table: Table) -> list[tuple[str, bool]]:
    """The words that belong to no flag, each with whether it is told: a flag is, and so is a word, unless it may be a
    value of the unknown flag before it, which the flag that looks most like it tells.

    Args:
        unknown: In the order of the command line.
        words: The command line.
    """
    found = []
    place, allowed = -1, 0.0
    for word in unknown:
        here = words.index(word, place + 1) if word in words[place + 1 :] else place + 1
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            allowed = 0.0 if equals else _takes(name, table)
            found.append((word, True))
        else:
            allowed = allowed - 1 if here == place + 1 else -1.0
            found.append((word, allowed < 0))
        place = here
    return found


def _takes(name: str, table: Table) -> float:
    """How many values an unknown flag may have, by the known one that it looks like."""
    near = table.by_name.get(table.nearest(name) or "")
    if near is None or near.nargs is not None:
        return float("inf")
    return 0.0 if near.kind in TAKES_NO_VALUE else 1.0
