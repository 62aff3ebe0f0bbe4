"""What ``--sglang-config`` says, and what the installed SGLang knows: read once, so that rules are pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.flags.flag import Flag
from miles.flags.passthrough import is_installed, sglang_flags
from miles.flags.problems import PassthroughUnreadable


@dataclass(frozen=True)
class EngineFacts:
    """Gathered only where a flag needs it.

    Attributes:
        topology: The YAML of ``--sglang-config``; None: there is none.
        topology_error: Why it cannot be read.
        arguments: SGLang's arguments, as flags, by field; empty: they were not looked at.
        arguments_error: Why they cannot be told.
    """

    topology: Any = None
    topology_error: str = ""
    arguments: Mapping[str, Flag] = field(default_factory=dict)
    arguments_error: str = ""

    @property
    def tool_call_parsers(self) -> tuple[str, ...]:
        """Names of parsers of tool calls; empty: they were not looked at."""
        known = self.arguments.get("tool_call_parser")
        return tuple(str(name) for name in known.choices) if known is not None else ()


def look_at_engines(values: Mapping[str, Any]) -> EngineFacts:
    """What the values of a command line need to know."""
    config, parser = values.get("sglang_config"), values.get("generate_tool_call_parser")
    topology, error = _read(config) if config else (None, "")
    if not (config or parser):
        return EngineFacts()
    arguments, arguments_error = _arguments()
    return EngineFacts(topology, error, arguments, arguments_error)


def _arguments() -> tuple[dict[str, Flag], str]:
    if not is_installed("sglang"):
        return {}, "SGLang is not installed"
    try:
        return {flag.dest.removeprefix("sglang_"): flag for flag in sglang_flags()}, ""
    except PassthroughUnreadable as error:
        return {}, f"{error.what}: {error.evidence}"


def _read(path: str) -> tuple[Any, str]:
    import yaml

    try:
        if path.startswith("base64:"):
            text = base64.b64decode(path.removeprefix("base64:"), validate=True).decode()
        else:
            text = Path(path).read_text()
        return yaml.safe_load(text), ""
    except (OSError, UnicodeError, binascii.Error) as error:
        return None, f"cannot be read: {error}"
    except yaml.YAMLError as error:
        return None, f"is not YAML: {error}"
