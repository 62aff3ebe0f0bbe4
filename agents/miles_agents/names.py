"""Names that people give to runs, nodes, meshes and services. They become parts of file names, so few letters pass."""

from __future__ import annotations

import re

from miles_agents.errors import ConfigError

_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class BadName(ConfigError):
    """A name holds something that a file name must not."""

    code = "E-CFG-002"


def checked_name(kind: str, name: object) -> str:
    """The name, if it is one. ``kind``: of what, for the error. Raises BadName."""
    if isinstance(name, str) and _ALLOWED.fullmatch(name):
        return name
    raise BadName(
        f"{name!r:.200} cannot be the name of a {kind}",
        evidence="names become parts of file names, and this one holds other characters, or is empty or too long",
        advice="Use 1 to 64 of A-Z a-z 0-9 . _ -, the first of them a letter or digit.",
    )
