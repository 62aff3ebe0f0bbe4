"""``--help`` and the list of all flags, from the table. Pure text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from miles.flags.flag import TAKES_NO_VALUE, Flag
from miles.flags.megatron_names import GROUP as MEGATRON_REFUSED
from miles.flags.problems import shown
from miles.flags.table import Table, spellings

_WIDE = 100
_WIDE_COLUMN, _NARROW_COLUMN = 42, 32
"""Where the text begins, in a terminal of at least _WIDE columns, and in a narrower one."""

_HEAD = (
    "usage: python train.py FLAGS",
    "",
    "Trains a language model by reinforcement learning: SGLang generates, Megatron-core or FSDP2 trains.",
    "Needed: --hf-checkpoint --prompt-data --rollout-batch-size --rollout-max-response-len --rm-type (or "
    "--custom-rm-path).",
)
_TAIL = (
    "--sglang-* takes any flag of the installed SGLang, --router-* any of sglang-router: `miles flags sglang` lists "
    "them.",
    "Flags that are refused, Megatron-LM's among them, are known by name: `miles flags NAME` says why, docs/flags.md "
    "lists all.",
)
_NOTES = {
    "model shape": "read from config.json of --hf-checkpoint; what is typed is compared with it",
    "older spellings": "read as what they are called today",
    "hooks": "functions and files of yours",
}
_WORDS = {"int": "N", "float": "X", "str": "NAME", "append": "KEY=VALUE", "count": "N", "yesno": "true|false"}


def render_help(table: Table, width: int = 120) -> str:
    """All groups with what they honour; what is refused is counted."""
    parts = [_paragraphs(_HEAD, width)]
    groups = [group for group in dict.fromkeys(flag.group for flag in table.flags) if group != MEGATRON_REFUSED]
    parts += [_group(group, [flag for flag in table.flags if flag.group == group], width) for group in groups]
    return "\n".join([*parts, _paragraphs(_TAIL, width)])


def _group(group: str, flags: Sequence[Flag], width: int) -> str:
    note = _NOTES.get(group)
    lines = textwrap.wrap(f"{group} ({note}):" if note else f"{group}:", width, break_on_hyphens=False)
    lines += [line for flag in flags if flag.only is None for line in describe(flag, width)]
    if fixed := [flag for flag in flags if flag.is_fixed]:
        values = ", ".join(f"{flag.name} {'|'.join(fixed_values(flag))}".rstrip() for flag in fixed)
        lines += _wrapped(f"taken only so: {values}", width)
    if refused := [flag for flag in flags if flag.status == "refused"]:
        lines += _wrapped(f"refused: {len(refused)} more, which `miles flags '{group}'` explains", width)
    return "\n".join(lines) + "\n"


def _paragraphs(texts: Iterable[str], width: int) -> str:
    return "\n".join(textwrap.fill(text, width, break_on_hyphens=False) for text in texts) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def describe(flag: Flag, width: int) -> list[str]:
    """A flag in two columns."""
    column = _WIDE_COLUMN if width >= _WIDE else _NARROW_COLUMN
    default = shown_default(flag)
    words = flag.help + (f" (default {default})" if default else "")
    body = textwrap.wrap(words, max(20, width - column - 2), break_on_hyphens=False) or [""]
    first = f"  {', '.join(spellings(flag))}{metavar(flag)}"
    if len(first) > column:
        names = textwrap.wrap(first, width, subsequent_indent="    ", break_on_hyphens=False)
        lines = [*names, *([_indent(body[0], column)] if body[0] else [])]
    else:
        lines = [f"{first:<{column}}  {body[0]}"]
    return [*(line.rstrip() for line in lines), *(_indent(line, column) for line in body[1:])]


def _indent(line: str, column: int) -> str:
    return (" " * (column + 2) + line).rstrip()


def shown_default(flag: Flag) -> str:
    """As one would type it; empty: there is none to speak of."""
    if flag.kind in TAKES_NO_VALUE or flag.older or flag.default in ([], {}):
        return ""
    return shown(flag.default)


def metavar(flag: Flag) -> str:
    """What stands for the value, with a space before it."""
    if flag.kind in TAKES_NO_VALUE:
        return ""
    word = "{" + ",".join(map(str, flag.choices)) + "}" if flag.choices else _WORDS.get(flag.kind, flag.kind.upper())
    return f" {word}" + (" ..." if flag.nargs in {"+", "*"} else "")


def fixed_values(flag: Flag) -> list[str]:
    """The values that a flag takes which takes no others; a flag without a value has none to show."""
    return [] if flag.kind in TAKES_NO_VALUE else [shown(value) for value in flag.only or ()]


def render_list(flags: Iterable[Flag], width: int = 120) -> str:
    """Each flag with its status and, where it is not simply honoured, why."""
    lines: list[str] = []
    for flag in flags:
        lines += describe(flag, width)
        column = _WIDE_COLUMN if width >= _WIDE else _NARROW_COLUMN
        if flag.is_fixed:
            values = ", ".join(fixed_values(flag)) or "what is done anyway"
            text = f"takes only: {values}" + (f" ({flag.reason})" if flag.reason else "")
        elif flag.status == "refused":
            text = f"refused: {flag.reason}"
        else:
            continue
        lines += [_indent(line, column) for line in textwrap.wrap(text, width - column - 2, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"
