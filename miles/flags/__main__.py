"""``python -m miles.flags FLAGS``: the short-lived process that resolves a command line. JSON on stdout.

``{"config": {...}, "notices": [...]}``, or ``{"problems": [...], "notices": [...]}``, or, where user code or an
installed package failed, ``{"error": {"text", "code", "exit_code"}}``. With ``--help`` it is ``{"help": TEXT}``, about
the flags that user code adds. The exit code is 0 for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

from miles.flags.entry import resolve_argv
from miles.flags.parse import parse
from miles.flags.resolve import with_defaults
from miles.flags.table import table
from miles.flags.user_arguments import user_help
from miles.tracking.secrets import take_variables
from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_FAILED
from miles_agents.errors import ConfigError, MilesError, UserCodeError


def answer(argv: list[str]) -> dict[str, Any]:
    """What is written."""
    try:
        if "--help" in argv:
            return {"help": _user_help([word for word in argv if word != "--help"])}
        resolved = resolve_argv(argv)
    except MilesError as error:
        exit_code = EXIT_BAD_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
        return {"error": {"text": _story(error), "code": error.code, "exit_code": exit_code}}
    if resolved.problems:
        problems = [problem.as_dict() for problem in resolved.problems]
        return {"problems": problems, "notices": list(resolved.notices)}
    return {"config": resolved.config, "notices": list(resolved.notices)}


def _user_help(argv: list[str]) -> str:
    flags = table()
    return user_help(with_defaults(parse(argv, flags), flags), shutil.get_terminal_size((120, 40)).columns)


def _story(error: MilesError) -> str:
    """A user's own traceback comes first."""
    if isinstance(error, UserCodeError):
        rest = f"{error.what}\n  what to do: {error.advice}\n  code: {error.code} (docs/errors.md)"
        return f"{error.evidence.rstrip()}\n\n{rest}"
    return str(error)


def main() -> None:
    """Answer on the real stdout; whatever user code prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        out.write(json.dumps(answer([*sys.argv[1:], *take_variables(os.environ)])) + "\n")


if __name__ == "__main__":
    main()
