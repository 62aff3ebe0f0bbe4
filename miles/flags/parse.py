"""From words to values: what was typed, converted, with every word that means nothing. Pure but for user parsers."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, NoReturn

from miles.flags.flag import TAKES_NO_VALUE, Flag, Plain
from miles.flags.group_engines import reason_for_absent
from miles.flags.misplaced import taken_out, unknown_words
from miles.flags.problems import REFUSED, Problem, listed, shown
from miles.flags.retired import with_todays_names
from miles.flags.table import Table, spellings

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf")


@dataclass
class Parsed:
    """What was typed.

    Attributes:
        typed: Converted values by dest.
        spelled: How each was typed, by dest.
        extra: Values of the flags that user code added, defaults too.
        problems: What could not be understood.
        notices: What is worth a line.
    """

    typed: dict[str, Plain] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Plain] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class ParseFailed(Exception):
    """The parser gave up at a word; the message is argparse's."""


class FlagParser(argparse.ArgumentParser):
    """An argparse parser that raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise ParseFailed(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise: ``--version`` of user code and the like do not end us."""
        raise ParseFailed(message or f"a flag of user code asked for the end (status {status})")


class _Record(argparse.Action):
    """Keeps the raw words of a flag of the table, under the flag's own name and not its dest."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        typed: list[tuple[str, Any]] = namespace.__dict__.setdefault("_typed", [])
        typed.append((option or "", values))


UserArguments = Callable[[argparse.ArgumentParser], object]


def build_parser(table: Table, user: Sequence[UserArguments] = ()) -> FlagParser:
    """A parser with the flags that user code adds, then those of the table.

    Raises:
        argparse.ArgumentError: User code adds a flag that exists.
    """
    if not user:
        return _of_table(table)
    parser = _of_table.__wrapped__(table)
    parser.argument_default = None
    for add_arguments in user:
        add_arguments(parser)
    return parser


@lru_cache(maxsize=4)
def _of_table(table: Table) -> FlagParser:
    parser = FlagParser(prog="train.py", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for flag in table.flags:
        nargs = 0 if flag.kind in TAKES_NO_VALUE else flag.nargs
        if flag.status == "refused" and nargs != 0:
            nargs = "*"  # whatever it is given: that it is refused is what there is to say
        parser.add_argument(*spellings(flag), dest=f"_flag {flag.name}", nargs=nargs, action=_Record)
    return parser


def parse(argv: Sequence[str], table: Table, user: Sequence[UserArguments] = ()) -> Parsed:
    """Read a command line. Nothing is derived here, and nothing is compared with anything else."""
    result = Parsed()
    words, result.notices = with_todays_names(argv, [name for name, flag in table.by_name.items() if not flag.older])
    values, unknown = _understood(result, words, table, user)
    for name, raw in values.pop("_typed", []):
        _take(result, table.by_name[name], name, raw)
    result.extra = values
    result.problems += _unknown(unknown, table)
    return result


def _understood(
    result: Parsed, words: list[str], table: Table, user: Sequence[UserArguments]
) -> tuple[dict[str, Any], list[tuple[str, bool]]]:
    """The namespace, and the words that belong to no flag, each with whether it is told.

    argparse gives up at the first word that it cannot place: that is told and taken out, and the rest is read again.
    """
    aside = False
    while True:
        try:
            parser = build_parser(table, () if aside else user)
            joined = _joined(words, parser)
            namespace, unknown = parser.parse_known_args(joined)
        except (ParseFailed, argparse.ArgumentError) as failure:
            problem, rest = taken_out(str(failure), words, table)
            result.problems.append(problem)
            if len(rest) == len(words):
                if aside or not user:
                    return {}, []
                aside = True  # what is wrong is a flag of user code: without those, no word can be called unknown
            words = rest
        else:
            return dict(vars(namespace)), [] if aside else unknown_words(unknown, joined, table)


def _joined(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """argparse takes ``-1e-3`` for a flag unless it is tied to the name before it."""
    words: list[str] = []
    for word in argv:
        before = words[-1] if words else ""
        is_value = _NEGATIVE.fullmatch(word) and before.startswith("--") and "=" not in before
        action = parser._option_string_actions.get(before) if is_value else None
        if action is not None and action.nargs is None:
            words[-1] = f"{before}={word}"
        else:
            words.append(word)
    return words


def _take(result: Parsed, flag: Flag, name: str, raw: Any) -> None:
    if flag.kind == "tri":
        value: Plain = not name.startswith("--no-")
    elif flag.kind in TAKES_NO_VALUE:
        value = flag.kind == "switch"
    elif flag.status == "refused":
        value = raw
    else:
        value = _converted(result, flag, name, raw)
        if flag.kind == "append" and not isinstance(value, str):
            return  # it has been told; there is nothing to append
    if not flag.takes(value):
        result.problems.append(refusal(flag, name, value))
        return
    if flag.kind == "append":
        value = [*result.typed.get(flag.dest, []), value]
    result.typed[flag.dest] = value
    result.spelled[flag.dest] = name


def refusal(flag: Flag, name: str, value: Plain) -> Problem:
    """Why this value of this flag is not taken."""
    allowed = listed(shown(value) for value in flag.only) if flag.only else ""
    advice = f"Give {name} {allowed}, or leave it out." if flag.only else "Leave it out."
    shown_value = "" if flag.kind in TAKES_NO_VALUE else shown(value)
    return Problem(name, shown_value, REFUSED + flag.reason, allowed, advice)


def _converted(result: Parsed, flag: Flag, name: str, raw: Any) -> Plain:
    words = raw if isinstance(raw, list) else [raw]
    values = []
    for word in words:
        try:
            value = convert(flag, word)
        except ValueError as error:
            allowed = listed(flag.choices) if flag.choices else KINDS[flag.kind]
            result.problems.append(
                Problem(name, str(word), str(error) or "is not allowed", allowed, f"Give {name} {allowed}.")
            )
            return flag.default if flag.takes(flag.default) else (flag.only or (None,))[0]
        values.append(value)
    return values if isinstance(raw, list) else values[0]


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "path": "a path",
    "json": "JSON",
    "count": "a whole number, such as 4096 or 4Ki",
    "yesno": "true or false",
    "append": "KEY=VALUE",
    **dict.fromkeys(TAKES_NO_VALUE, "true or false"),
}
"""What is allowed, by kind of flag."""


def convert(flag: Flag, word: Any) -> Plain:
    """The value of a word, or of a value from a file.

    Raises:
        ValueError: It is not of the flag's kind, or not among its choices.
    """
    value = _of_kind(flag.kind, word)
    if flag.choices and value not in flag.choices:
        raise ValueError("is not one of the choices")
    return value


def _of_kind(kind: str, word: Any) -> Plain:
    if kind in TAKES_NO_VALUE or kind == "yesno":
        known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if str(word).lower() not in known:
            raise ValueError("is neither true nor false")
        return known[str(word).lower()]
    if kind == "int":
        return _whole(word)
    if kind == "float":
        if isinstance(word, bool):
            raise ValueError("is not a number")
        try:
            value = float(word)
        except (TypeError, ValueError):
            raise ValueError("is not a number") from None
        if math.isnan(value):
            raise ValueError("is not a number")
        return value
    if kind == "json":
        return _json(word)
    if kind == "count":
        return _count(word)
    if kind == "path" and not str(word):
        raise ValueError("is an empty path")
    if kind == "append" and (not isinstance(word, str) or not re.fullmatch(r"[A-Za-z_]\w*=.*", word, re.DOTALL)):
        raise ValueError("is not of the form KEY=VALUE")
    return str(word)


def _whole(word: Any) -> int:
    try:
        if isinstance(word, str):
            return int(word.replace("_", ""))
        if not isinstance(word, bool) and int(word) == word:
            return int(word)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("is not a whole number")


def _count(word: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT])|(\d+)([KMGT])i", str(word).replace("ki", "Ki"))
    if not match:
        return _whole(word)
    decimal, suffix, binary, prefix = match.groups()
    if decimal is not None:
        return int(Decimal(decimal) * 1000 ** ("kMGT".index(suffix) + 1))
    return int(binary) << 10 * ("KMGT".index(prefix) + 1)


def _json(word: Any) -> Plain:
    if not isinstance(word, str):
        return word
    try:
        return json.loads(word)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _unknown(words: Sequence[tuple[str, bool]], table: Table) -> list[Problem]:
    problems = []
    for word, is_told in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            if reason := reason_for_absent(name):
                problems.append(Problem(name, value, REFUSED + reason, "", "Leave it out."))
                continue
            near = table.nearest(name)
            advice = f"Did you mean {near}?" if near else "Look it up in --help."
            problems.append(Problem(name, value, "there is no such flag", near or "", advice))
        elif is_told:
            problems.append(
                Problem(word, "", "a word that belongs to no flag", "", "Remove it, or put it after its flag.")
            )
    return problems
