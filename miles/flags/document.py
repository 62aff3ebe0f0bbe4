"""``docs/flags.md``: the reference page of all flags, from the table. ``python -m miles.flags.document`` writes it.

Flags of installed packages are not on it: they are those of the installed version, see ``miles flags sglang``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from miles.flags.flag import TAKES_NO_VALUE, Flag
from miles.flags.help import fixed_values, metavar, shown_default
from miles.flags.megatron_names import GROUP as MEGATRON_REFUSED
from miles.flags.table import Table, spellings, table

_INTRODUCTION = """\
# Flags

<!-- Written by `python -m miles.flags.document`; a test compares. -->

All flags of `train.py`, from the one table that the parser and `--help` are made of. Every flag is **honoured** (it
reaches the behaviour that it names) or **refused** by name, with the reason. Some are honoured for certain values only;
another value is refused with the reason that stands with them.

`miles flags WORD` shows those with the word in their name, or in the name of their group. `miles flags --json` lists
all, those of the installed SGLang (`--sglang-*`) and sglang-router (`--router-*`) too, as objects with these keys:

| key | what it holds |
|---|---|
| `name`, `names` | the usual spelling, and all of them |
| `dest` | its key in the resolved config, and its name in `args` |
| `type` | `int`, `float`, `str`, `path`, `json`, `count` (4096, 4Ki), `yesno` (true, false), `append` (may be \
repeated); without a value: `switch` (off until named), `off` (on until named), `tri` (has a `--no-` twin) |
| `default`, `choices`, `nargs` | the value if it is not typed; values that exist at all; `+`, `*` or a number of \
values, null for one |
| `group`, `help` | as in `--help` |
| `status` | `honoured` or `refused` |
| `values` | null: any value is honoured. A list: only these are, others are refused. Empty: it is refused |
| `reason` | why others are refused |
| `stands_for` | of an older spelling: the words that are read instead |
| `source` | who named it: `contract`, `reference`, `megatron`, `ours`, `sglang`, `router` |

A flag that this run does not read is reported when it starts, and so is an older spelling. `--custom-config-path` takes
values by `dest`. Problems are told all at once, before anything starts; flags that one missing feature keeps out are
one problem.
"""


def page(flags: Table) -> str:
    """Markdown."""
    groups = list(dict.fromkeys(flag.group for flag in flags.flags if flag.group != MEGATRON_REFUSED))
    members = {group: [flag for flag in flags.flags if flag.group == group] for group in [*groups, MEGATRON_REFUSED]}
    counts = {status: sum(flag.status == status for flag in flags.flags) for status in ("honoured", "refused")}
    parts = [
        _INTRODUCTION,
        f"{len(flags.flags)} flags: {counts['honoured']} honoured, {counts['refused']} refused.\n",
        "".join(f"* [{group}](#{_anchor(group)})\n" for group in members),
        *(_group(group, members[group]) for group in groups),
        _refused(MEGATRON_REFUSED, members[MEGATRON_REFUSED]),
    ]
    return "\n".join(parts)


def _anchor(group: str) -> str:
    return "".join(letter for letter in group.lower().replace(" ", "-") if letter.isalnum() or letter == "-")


def _group(group: str, flags: Sequence[Flag]) -> str:
    honoured = [flag for flag in flags if flag.status == "honoured"]
    refused = [flag for flag in flags if flag.status == "refused"]
    parts = [f"## {group}\n"]
    if honoured:
        parts.append("| flag | default | what it does |\n|---|---|---|\n" + "".join(map(_row, honoured)))
    if refused:
        parts.append("Refused:\n\n" + _reasons(refused))
    return "\n".join(parts)


def _refused(group: str, flags: Sequence[Flag]) -> str:
    return f"## {group}\n\n{_reasons(flags)}"


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in spellings(flag))
    value = f" `{metavar(flag).strip()}`" if metavar(flag) else ""
    default = f"`{shown_default(flag)}`" if shown_default(flag) else ""
    return f"| {_cell(names + value)} | {_cell(default)} | {_cell(flag.help + _only(flag))} |\n"


def _only(flag: Flag) -> str:
    if not flag.is_fixed:
        return ""
    values = ", ".join(f"`{value}`" for value in fixed_values(flag))
    what = f"only {values}" if values else "it is what is done anyway"
    return f" ({what}{': ' + flag.reason if flag.reason and flag.kind not in TAKES_NO_VALUE else ''})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _reasons(flags: Iterable[Flag]) -> str:
    by_reason: dict[str, list[str]] = {}
    for flag in flags:
        by_reason.setdefault(flag.reason, []).append(f"`{flag.name}`")
    return "".join(f"* {reason}: {', '.join(names)}\n" for reason, names in by_reason.items())


def main() -> None:
    """Write the page to docs/flags.md of this source tree, or to the path that is given."""
    beside = Path(__file__).parents[2] / "docs" / "flags.md"
    (Path(sys.argv[1]) if len(sys.argv) > 1 else beside).write_text(page(table()))


if __name__ == "__main__":
    main()
