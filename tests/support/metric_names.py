"""The names of metrics that docs/metrics.md has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

ANY = ("train/*", "eval/{set}/*")
"""What user code names, and what is named as in rollouts: looked at by ``undocumented``."""


def documented():
    """A pattern for each name in the tables of docs/metrics.md."""
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row) if "/" in name and name not in ANY]
    assert len(names) > 90
    return [re.compile(re.sub(r"\\\{\w+\\\}", r"[^/]+", re.escape(name)).replace(r"\*", ".+")) for name in names]


def undocumented(names):
    patterns = documented()
    plain = {name: re.sub(r"^eval/[^/]+/", "rollout/", name) for name in names if "/" in name}
    return [name for name, known in plain.items() if not any(pattern.fullmatch(known) for pattern in patterns)]
