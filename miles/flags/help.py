"""``--help`` and the list of all flags, from the table. Pure text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from miles.flags.flag import TAKES_NO_VALUE, Flag
from miles.flags.megatron_names import GROUP as MEGATRON_REFUSED
from miles.flags.problems import shown
from miles.flags.table import Table, spellings

_NAME_COLUMN = 42

_HEAD = """\
usage: python train.py FLAGS

Trains a language model by reinforcement learning: SGLang generates, Megatron-core or FSDP2 trains.
Needed: --hf-checkpoint --prompt-data --rollout-batch-size --rollout-max-response-len --rm-type (or --custom-rm-path).
"""

_TAIL = """\
--sglang-* takes any flag of the installed SGLang, --router-* any of sglang-router: see `miles flags sglang`.
Megatron-LM's other flags are refused by name: `miles flags NAME` says why.
"""


def render_help(table: Table, width: int = 120) -> str:
    """All groups with what they honour; names that are refused follow each group."""
    parts = [_HEAD]
    for group in dict.fromkeys(flag.group for flag in table.flags):
        if group == MEGATRON_REFUSED:
            continue
        flags = [flag for flag in table.flags if flag.group == group]
        taken = [flag for flag in flags if flag.only is None]
        lines = [line for flag in taken for line in describe(flag, width)]
        rest = [flag for flag in flags if flag not in taken]
        parts.append("\n".join([f"{group}:", *lines, *_rest(rest, width)]) + "\n")
    return "\n".join([*parts, _TAIL])


def describe(flag: Flag, width: int) -> list[str]:
    """A flag in two columns."""
    names = ", ".join(spellings(flag)) + _metavar(flag)
    default = shown(flag.default) if flag.kind not in TAKES_NO_VALUE and flag.kind != "json" else ""
    words = flag.help + (f" (default {default})" if default else "")
    body = textwrap.wrap(words, max(20, width - _NAME_COLUMN - 2)) or [""]
    first = f"  {names}"
    if len(first) > _NAME_COLUMN:
        lines = [first, " " * (_NAME_COLUMN + 2) + body[0]]
    else:
        lines = [f"{first:<{_NAME_COLUMN}}  {body[0]}"]
    return [*(line.rstrip() for line in lines), *(" " * (_NAME_COLUMN + 2) + line for line in body[1:])]


def _metavar(flag: Flag) -> str:
    if flag.kind in TAKES_NO_VALUE:
        return ""
    word = "{" + ",".join(map(str, flag.choices)) + "}" if flag.choices else _WORDS.get(flag.kind, flag.kind.upper())
    return f" {word}" + (" ..." if flag.nargs in {"+", "*"} else "")


_WORDS = {"int": "N", "float": "X", "str": "NAME", "append": "KEY=VALUE", "count": "N"}


def _rest(flags: Sequence[Flag], width: int) -> list[str]:
    if not flags:
        return []
    names = ", ".join(flag.name for flag in flags)
    return textwrap.wrap(
        f"not built, or fixed: {names}", width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def render_list(flags: Iterable[Flag], width: int = 120) -> str:
    """Each flag with its status and, where it is not simply honoured, why."""
    lines: list[str] = []
    for flag in flags:
        lines += describe(flag, width)
        if flag.is_fixed:
            values = ", ".join(_fixed(flag))
            lines.append(
                " " * (_NAME_COLUMN + 2) + f"takes only: {values}" + (f" ({flag.reason})" if flag.reason else "")
            )
        elif flag.status == "refused":
            lines.append(" " * (_NAME_COLUMN + 2) + f"refused: {flag.reason}")
    return "\n".join(lines) + "\n"


def _fixed(flag: Flag) -> list[str]:
    if flag.kind in TAKES_NO_VALUE:
        return ["what is done anyway"]
    return [shown(value) for value in flag.only or ()]
