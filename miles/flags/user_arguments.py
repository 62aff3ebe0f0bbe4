"""Flags that user code adds: ``add_arguments(parser)`` of the rollout function and of the generate function.

Only the process that resolves flags imports these modules for that; its output is no channel that they could disturb.
"""

from __future__ import annotations

import argparse
import importlib
import traceback
from collections.abc import Mapping
from typing import Any

from miles.flags.hook_facts import find_module, why_not_found
from miles.flags.parse import UserArguments
from miles.flags.problems import UserArgumentsFailed

DESTS = ("rollout_function_path", "custom_generate_function_path")


def load_user_arguments(values: Mapping[str, Any]) -> list[UserArguments]:
    """The functions that add flags, of the code that these values name.

    Raises:
        UserArgumentsFailed: A module raised when it was imported. What cannot be found is told by the rules.
    """
    found = []
    for dest in DESTS:
        path = values.get(dest)
        if not path or isinstance(find_module(path), str):
            continue
        module, _, name = path.rpartition(".")
        flag = "--" + dest.replace("_", "-")
        try:
            there = importlib.import_module(module)
            if not hasattr(there, name) and why_not_found(path):
                continue
            function = getattr(there, name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # boundary: user code
            raise _failed(f"{flag} {path} cannot be imported", error) from None
        add_arguments = getattr(function, "add_arguments", None)
        if callable(add_arguments):
            found.append(_named(add_arguments, f"add_arguments of {flag} {path} raised"))
    return found


def user_help(values: Mapping[str, Any], width: int) -> str:
    """What ``--help`` says about the flags of the code that these values name; empty: it adds none.

    Raises:
        UserArgumentsFailed: It could not be imported, or raised.
    """
    parser = argparse.ArgumentParser(
        add_help=False,
        usage=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=width),
    )
    parser._optionals.title = f"of {' and '.join(values[dest] for dest in DESTS if values.get(dest))}"
    for add_arguments in load_user_arguments(values):
        add_arguments(parser)
    return parser.format_help().strip("\n")


def _named(add_arguments: UserArguments, what: str) -> UserArguments:
    def add(parser: argparse.ArgumentParser) -> None:
        try:
            add_arguments(parser)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # boundary: user code
            raise _failed(what, error) from None

    return add


def _failed(what: str, error: BaseException) -> UserArgumentsFailed:
    trace = "".join(traceback.format_exception(error))
    return UserArgumentsFailed(what, evidence=trace, advice="Repair the code; the traceback says where.")
