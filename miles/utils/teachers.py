"""Teachers of on-policy distillation, as flags name them: ``--opd-teacher-urls NAME=URL``, or one at ``--rm-url``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

DEFAULT = "default"
"""The name of a teacher that is named by ``--rm-url`` alone."""
_BETWEEN = re.compile(r",(?=[^,=/]+=)")


def read_teachers(words: Sequence[str] | None, rm_url: str | None) -> dict[str, str]:
    """Address by name, of SGLang servers. Pairs may also be separated by commas.

    Raises:
        ValueError: A word is no ``NAME=URL``, or a name stands there twice.
    """
    if not words:
        return {DEFAULT: server_of(rm_url)} if rm_url else {}
    found: dict[str, str] = {}
    for pair in (pair for word in words for pair in _BETWEEN.split(word)):
        name, equals, url = pair.partition("=")
        if not (name and equals and url):
            raise ValueError(f"{pair!r} is not NAME=URL")
        if name in found:
            raise ValueError(f"there are two teachers {name!r}")
        found[name] = server_of(url)
    return found


def server_of(url: str) -> str:
    """The address of the server itself: what is asked may stand behind it (``/generate``).

    Raises:
        ValueError: It is no address of an HTTP server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of an HTTP server")
    return url.rstrip("/").removesuffix("/generate").rstrip("/")
