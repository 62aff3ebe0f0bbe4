"""Which names say that what they stand for is a secret: of variables, of keys in files, of parts of a URL. Pure."""

from __future__ import annotations

import re
from typing import Any

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ALWAYS = re.compile(r"(passw(or)?d|passphrase|secret|credential|api_?key|access_?key|secret_?key|private_?key)s?$")
"""However such a name begins, and whatever its value is."""
_SHORT = frozenset({"auth", "authorization", "bearer", "cookie", "pass", "pat", "pwd"})
_INNOCENT_TEXT = {
    "key": "input label metadata tool multimodal teacher reward checker sort cache primary foreign routing prompt "
    "image answer question group index dict json config column data field public",
    "token": "bos eos pad unk sep mask cls stop special start end prefix middle suffix eod think per next first last "
    "image video audio",
    "tokens": "total special new prompt output input response draft stop seen pad id image video",
    "pass": "first second third two single one multi forward backward by",
    "pat": "file name glob path",
}
_INNOCENT = {word: frozenset(before.split()) for word, before in _INNOCENT_TEXT.items()}
"""What stands before a word that makes it something else."""
_COUNTS = frozenset({"max", "min", "num"})
_OF_URLS = frozenset({"sig", "signature", "code"})


def is_secret(name: str, value: Any = "") -> bool:
    """Whether a name says so: ``DB_PASS`` and ``openai_api_key`` do; ``max_tokens``, ``label_key``, ``pass_rate`` not.
    What is a number or a switch, or not there, is a secret by the name of a password only."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if words[-2:] == ["key", "id"]:  # AWS_ACCESS_KEY_ID
        words.pop()
    if not words or value is None:
        return False
    if _ALWAYS.search("_".join(words)):
        return not isinstance(value, bool)
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if isinstance(value, bool | int | float):
        return False
    if before in _INNOCENT.get(last, _INNOCENT.get(last.removesuffix("s"), frozenset())):
        return False
    if last in _SHORT:
        return bool(before) or last not in ("pass", "pat", "pwd")  # PWD is a directory
    if last == "tokens":
        return not str(value).isdecimal() and not _COUNTS & set(words)
    return last in ("key", "keys") or last.endswith("token")


def is_secret_of_url(name: str) -> bool:
    """Whether a parameter of a URL (``?token=...``) is one."""
    return is_secret(name) or name.lower().rpartition("-")[2] in _OF_URLS
