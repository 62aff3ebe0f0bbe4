"""The steps from a command line to a config: the shell around the pure parts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles.flags.config_file import apply_config, read_config
from miles.flags.facts import gather
from miles.flags.parse import Parsed, UserArguments, parse
from miles.flags.passthrough import router_flags, sglang_flags
from miles.flags.problems import Problem
from miles.flags.resolve import Resolved, resolve, with_defaults
from miles.flags.table import Table, table
from miles.flags.user_arguments import load_user_arguments


def resolve_argv(argv: Sequence[str], user: Sequence[UserArguments] = ()) -> Resolved:
    """Parse, read what is named, derive, check.

    Args:
        argv: Without the program's name.
        user: Functions that add flags to the parser, besides those of user code that the flags name.

    Raises:
        PassthroughUnreadable: ``--sglang-*`` or ``--router-*`` flags, and the package's parser cannot be read.
        UserArgumentsFailed: User code that adds flags failed.
    """
    values = _file_values(argv)
    keys = values if isinstance(values, dict) else {}
    flags = table_for([*argv, *("--" + key.replace("_", "-") for key in keys)])
    first = _parsed(argv, flags, values)
    added = [*user, *load_user_arguments(with_defaults(first, flags))]
    parsed = _parsed(argv, flags, values, added) if added else first
    facts = gather(with_defaults(parsed, flags), run_dir=new_run_dir())
    return resolve(parsed, flags, facts)


def table_for(words: Sequence[str]) -> Table:
    """All flags; those of installed packages only if one of the words may be one of them."""
    flags = table()
    known = {name for name, flag in flags.by_name.items() if not flag.older}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    if any(word.startswith("--sglang-") for word in unknown):
        flags = flags.extended(sglang_flags())
    if any(word.startswith("--router-") for word in unknown):
        flags = flags.extended(router_flags())
    return flags


def new_run_dir() -> str:
    """Where a run without ``--run-dir`` writes: named by time and process, so that it is new."""
    return str(Path("runs").absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


def _file_values(argv: Sequence[str]) -> dict[str, Any] | Problem | None:
    path = parse(argv, table()).typed.get("custom_config_path")
    return read_config(path) if path else None


def _parsed(
    words: Sequence[str], flags: Table, values: dict[str, Any] | Problem | None, user: Sequence[UserArguments] = ()
) -> Parsed:
    parsed = parse(words, flags, user)
    if isinstance(values, Problem):
        parsed.problems.append(values)
    elif values:
        apply_config(parsed, flags, values)
    return parsed
