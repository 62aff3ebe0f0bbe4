"""``python -m miles.flags FLAGS``: the short-lived process that resolves a command line. JSON on stdout.

``{"config": {...}, "notices": [...]}``, or ``{"problems": [...], "notices": [...]}``, or, where user code or an
installed package failed, ``{"error": {"what", "evidence", "advice", "code"}}``. The exit code is 0 for all of them.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from miles.flags.entry import resolve_argv
from miles_agents.errors import MilesError


def answer(argv: list[str]) -> dict[str, Any]:
    """What is written."""
    try:
        resolved = resolve_argv(argv)
    except MilesError as error:
        return {"error": {key: getattr(error, key) for key in ("what", "evidence", "advice", "code")}}
    if resolved.problems:
        problems = [problem.as_dict() for problem in resolved.problems]
        return {"problems": problems, "notices": list(resolved.notices)}
    return {"config": resolved.config, "notices": list(resolved.notices)}


def main() -> None:
    """Answer on the real stdout; whatever user code prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        out.write(json.dumps(answer(sys.argv[1:])) + "\n")


if __name__ == "__main__":
    main()
