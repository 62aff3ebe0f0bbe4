"""``miles flags [--json | --markdown] [WORD ...]``: flags of ``train.py``, or those with a word in name or group."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence

from miles.flags.flag import Flag
from miles.flags.help import render_list
from miles.flags.table import spellings, table
from miles_agents.errors import MilesError


def main(argv: Sequence[str]) -> int:
    """Write the list; returns 0, or 1 if no flag has such a name."""
    parser = argparse.ArgumentParser(prog="miles flags", allow_abbrev=False, description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of a name, such as sglang or clip, or a group")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, with status and source: docs/flags.md has the keys")
    form.add_argument("--markdown", action="store_true", help="the reference page, docs/flags.md")
    own = {"--json", "--markdown", "-h", "--help"}
    options = parser.parse_args([word if word in own else word.lstrip("-") for word in argv])
    if options.markdown:
        from miles.flags.document import page

        sys.stdout.write(page(table()))
        return 0
    words = options.words
    try:
        flags = [flag for flag in _all(words, options.json) if not words or any(_has(flag, word) for word in words)]
    except MilesError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.json:
        sys.stdout.write(json.dumps([flag.as_dict() for flag in flags], indent=1) + "\n")
    else:
        sys.stdout.write(render_list(flags, shutil.get_terminal_size((120, 40)).columns))
    if not flags:
        near = table().nearest("--" + words[0])
        sys.stderr.write(
            f"no flag has {' or '.join(words)} in its name" + (f"; did you mean {near}?\n" if near else "\n")
        )
    return 0 if flags else 1


def _has(flag: Flag, word: str) -> bool:
    return word == flag.group or any(word in name for name in spellings(flag))


def _all(words: Sequence[str], everything: bool) -> tuple[Flag, ...]:
    """The installed packages' flags where they are asked for: reading SGLang's takes seconds the first time.

    ``everything``: without words, those of all packages that are installed.
    """
    from miles.flags.passthrough import Package, is_installed, router_flags, sglang_flags

    flags = table()
    packages: dict[Package, Callable[[], tuple[Flag, ...]]] = {"sglang": sglang_flags, "router": router_flags}
    for package, read in packages.items():
        is_named = any(word.startswith(package) for word in words)
        if is_named or (everything and not words and is_installed(package)):
            flags = flags.extended(read())
    return flags.flags
