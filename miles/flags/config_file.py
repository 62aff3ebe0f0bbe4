"""``--custom-config-path``: further values from a YAML file, applied before anything is derived from them."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from miles.flags.flag import Flag
from miles.flags.parse import KINDS, Parsed, convert, refusal
from miles.flags.problems import Problem, listed, shown
from miles.flags.table import Table
from miles.tracking.secrets import shown_value

FLAG = "--custom-config-path"
_MAY_BE_NONE = frozenset({"str", "path", "json"})
"""Of these kinds ``null`` says that there is none, whatever the default (``tool_key: null``)."""


def read_config(path: str) -> dict[str, Any] | Problem:
    """The values of a YAML file, or of ``base64:...``, which holds one."""
    import yaml

    try:
        if path.startswith("base64:"):
            text = base64.b64decode(path.removeprefix("base64:"), validate=True).decode()
        else:
            text = Path(path).read_text()
        values = yaml.safe_load(text)
    except (OSError, UnicodeError, binascii.Error) as error:
        return Problem(FLAG, path, f"cannot be read: {error}", "a YAML file", "Correct the path.")
    except yaml.YAMLError as error:
        return Problem(FLAG, path, f"is not YAML: {error}", "key: value", "Repair the file.")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        return Problem(FLAG, path, "does not hold keys with values", "key: value", "Repair the file.")
    return values


def apply_config(parsed: Parsed, table: Table, values: dict[str, Any]) -> None:
    """As if typed, and stronger: a value from the file replaces a typed one, with a notice."""
    for key, value in values.items():
        dest = key.replace("-", "_")
        flag = table.by_dest.get(dest)
        if flag is not None and FLAG in flag.names:
            what = "stands in the file that it names"
            parsed.problems.append(Problem(f"{FLAG}: {dest}", shown(value), what, "other flags", "Take it out."))
            continue
        if why := _why_not_kept(flag, value):
            allowed = "texts, numbers, true, false, null, lists and mappings of these"
            advice = "Write dates in quotes, and nothing inside itself."
            parsed.problems.append(Problem(f"{FLAG}: {dest}", str(value)[:200], why, allowed, advice))
            continue
        if flag is None:
            _extra(parsed, table, key, value)
            continue
        if dest in parsed.typed and parsed.typed[dest] != value:
            old, new = _shown(dest, parsed.typed[dest]), _shown(dest, value)
            parsed.notices.append(f"{parsed.spelled[dest]} {old} is replaced by {new} of {FLAG}")
        _take(parsed, flag, value)


def _why_not_kept(flag: Flag | None, value: Any) -> str:
    """Why the config, which is JSON, cannot hold a value of the file. Empty: it can, or becomes a text."""
    if flag is not None and flag.kind != "json" and not isinstance(value, list | dict):
        return ""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        return f"JSON cannot hold it: {error}"
    return ""


def _take(parsed: Parsed, flag: Flag, value: Any) -> None:
    try:
        converted = _converted(flag, value)
    except ValueError as error:
        allowed = listed(flag.choices) if flag.choices else KINDS[flag.kind]
        given = _shown(flag.dest, value)
        parsed.problems.append(Problem(f"{FLAG}: {flag.dest}", given, str(error), allowed, "Repair the file."))
        return
    if not flag.takes(converted) and converted != flag.default:
        parsed.problems.append(refusal(flag, f"{FLAG}: {flag.dest}", converted))
        return
    parsed.typed[flag.dest] = converted
    parsed.spelled.setdefault(flag.dest, f"{FLAG}: {flag.dest}")


def _converted(flag: Flag, value: Any) -> Any:
    """Raises ValueError."""
    if value is None:
        if flag.default is not None and flag.kind not in _MAY_BE_NONE:
            raise ValueError(f"needs a value; without one it is {shown(flag.default)}")
        return None
    if flag.kind == "append" and isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    takes_several = flag.nargs in ("+", "*") or flag.kind == "append"
    if takes_several and not (flag.kind == "json" and isinstance(value, dict)):
        return [convert(flag, item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list | dict) and flag.kind != "json":
        raise ValueError("takes one value")
    return convert(flag, value)


def _shown(dest: str, value: Any) -> str:
    return shown_value(dest, shown(value))


def _extra(parsed: Parsed, table: Table, key: str, value: Any) -> None:
    near = table.nearest("--" + key.replace("_", "-"))
    hint = f"; the flag {near} is not meant?" if near else ""
    parsed.notices.append(f"{FLAG}: {key} is no flag, and goes to user code as it is{hint}")
    parsed.extra[key] = value
