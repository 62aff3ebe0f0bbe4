"""Keys and passwords: where they are taken out, so that no file, log, title or command line has them. Pure but for
``cover_argument``."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from miles.tracking.secret_names import is_secret, is_secret_of_url

SECRET_FLAGS = {"--wandb-key": "wandb_key"}
"""Flags whose value is a secret, with their keys in the config."""
_VARIABLE, _VARIABLES = "--env", "--train-env-vars"
HIDDEN = "***"
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")
"""Up to the last @ of a host: passwords may have one."""
_PARAMETER = re.compile(r"([?&;]([\w.-]+)=)[^&;#\s]+")


def take_secrets(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of the config in which secrets are None, and the secrets by their keys."""
    found = {key: str(config[key]) for key in SECRET_FLAGS.values() if config.get(key)}
    return {**config, **dict.fromkeys(found)}, found


def for_people(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as files and trackers show it: without secrets, passwords in URLs, and values whose names say that
    they are secret: of variables, and of what a file gives to user code."""
    return {key: _shown(key, value) for key, value in config.items()}


def _shown(key: str, value: Any) -> Any:
    if key in SECRET_FLAGS.values():
        return None if value is None else HIDDEN
    if is_secret(key, value):
        return HIDDEN
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {name: _shown(str(name), one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown("", one) for one in value]
    return value


def without_credentials(text: str) -> str:
    """The text with what stands before the @ of a URL hidden, and parameters of URLs that are secret by their names."""
    return _PARAMETER.sub(_parameter, _CREDENTIALS.sub(f"{HIDDEN}@", text))


def _parameter(match: re.Match[str]) -> str:
    return match[1] + HIDDEN if is_secret_of_url(match[2]) else match[0]


def shown_value(dest: str, text: str) -> str:
    """A value of a flag as a terminal shows it."""
    return HIDDEN if dest in SECRET_FLAGS.values() and text else text


def shown_argv(argv: Sequence[str]) -> list[str]:
    """The command line as a terminal shows it: like ``for_people``, and of variables only their names."""
    shown: list[str] = []
    flag, is_open = "", False
    for word in argv:
        if word.startswith("--") and not (is_open and flag in SECRET_FLAGS):
            flag, equals, value = word.partition("=")
            is_open = not equals
            shown.append(f"{flag}={_argument(flag, value)}" if equals else word)
        else:
            is_open = False
            shown.append(_argument(flag, word))
    return shown


def _argument(flag: str, word: str) -> str:
    key = flag.strip("-").replace("-", "_")
    if flag == _VARIABLE:
        return f"{word.partition('=')[0]}={HIDDEN}" if "=" in word else HIDDEN
    try:
        value = json.loads(word) if word[:1] in ("{", "[") else word
    except ValueError:
        value = word
    if flag == _VARIABLES:
        return json.dumps(dict.fromkeys(value, HIDDEN)) if isinstance(value, dict) else HIDDEN
    shown = _shown(key, value)
    if shown == value:
        return word
    return shown if isinstance(shown, str) else json.dumps(shown)


def split_argv(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line without secret flags, and their values by flag. Both forms: two words, or one with ``=``."""
    words: list[str] = []
    found: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in SECRET_FLAGS:
            words.append(word)
        elif equals:
            found[name] = value
        else:
            following = next(rest, None)
            if following is None:
                words.append(word)  # the parser says what is missing
            else:
                found[name] = following
    return words, found


def as_variables(found: Mapping[str, str]) -> dict[str, str]:
    """Secrets by flag as variables for a process of ours: unlike command lines, only their user can read them."""
    return {_variable(flag): value for flag, value in found.items()}


def take_variables(environment: MutableMapping[str, str]) -> list[str]:
    """Inverse of ``as_variables``, as words of a command line. The variables are gone afterwards."""
    found = [(flag, environment.pop(_variable(flag), None)) for flag in SECRET_FLAGS]
    return [f"{flag}={value}" for flag, value in found if value is not None]


def _variable(flag: str) -> str:
    return "MILES_SECRET_" + flag.strip("-").replace("-", "_").upper()


def cover_argument(secret: str, *, proc: Path = Path("/proc/self")) -> bool:
    """Overwrite this word of the command line that this process was started with, which every user of the machine can
    read. Whether it was found. What stands in the history of a shell stays."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Fields of stat after the name in parentheses; arg_start and arg_end are numbers 48 and 49 (proc(5)).
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        line = (proc / "cmdline").read_bytes()
        if not start or end - start != len(line) or ctypes.string_at(start, len(line)) != line:
            return False
        place = line.find(secret.encode())
        if not secret or place < 0:
            return False
        ctypes.memset(start + place, ord("*"), len(secret.encode()))
        return True
    return False
