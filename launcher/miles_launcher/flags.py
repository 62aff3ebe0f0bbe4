"""``miles flags [--json] [WORD ...]``: all flags of ``train.py``, or those whose name has one of the words in it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence

from miles.flags.flag import Flag
from miles.flags.help import render_list
from miles.flags.table import spellings, table
from miles_agents.errors import MilesError


def main(argv: Sequence[str]) -> int:
    """Write the list; returns 0, or 1 if no flag has such a name."""
    parser = argparse.ArgumentParser(prog="miles flags", allow_abbrev=False, description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of a name, such as sglang or clip")
    parser.add_argument("--json", action="store_true", help="as JSON, with status and source")
    own = {"--json", "-h", "--help"}
    options = parser.parse_args([word if word in own else word.lstrip("-") for word in argv])
    words = options.words
    try:
        flags = [flag for flag in _all(words) if not words or any(_has(flag, word) for word in words)]
    except MilesError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.json:
        rows = [flag.as_dict() for flag in flags]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        sys.stdout.write(render_list(flags, shutil.get_terminal_size((120, 40)).columns))
    if not flags:
        near = table().nearest("--" + words[0])
        sys.stderr.write(
            f"no flag has {' or '.join(words)} in its name" + (f"; did you mean {near}?\n" if near else "\n")
        )
    return 0 if flags else 1


def _has(flag: Flag, word: str) -> bool:
    return any(word in name for name in spellings(flag))


def _all(words: Sequence[str]) -> tuple[Flag, ...]:
    """The installed packages' flags only where they are asked for: reading SGLang's takes seconds the first time."""
    from miles.flags.passthrough import router_flags, sglang_flags

    flags = table()
    if any(word.startswith("sglang") for word in words):
        flags = flags.extended(sglang_flags())
    if any(word.startswith("router") for word in words):
        flags = flags.extended(router_flags())
    return flags.flags
