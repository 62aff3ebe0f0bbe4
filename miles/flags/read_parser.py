"""``python -m miles.flags.read_parser sglang|router OUT``: the flags of an installed package's own parser, as JSON.

A process of its own, because SGLang's parser needs torch and seconds. On a machine without CUDA it is started with
the stand-ins of ``miles.backends.sglang_utils`` on its path.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_KINDS = {
    "int": "int",
    "float": "float",
    "loads": "json",
    "json_list_type": "json",
    "parse_cuda_graph_config_arg": "json",
    "human_readable_int": "count",
    "bool": "yesno",
}


def main() -> None:
    """Write the rows."""
    which, out = sys.argv[1], Path(sys.argv[2])
    parser = argparse.ArgumentParser(add_help=False)
    if which == "router":
        from sglang_router.router_args import RouterArgs

        RouterArgs.add_cli_args(parser, use_router_prefix=True, exclude_host_port=True)
    else:
        _add_sglang(parser)
    rows = [row(action) for action in parser._actions if type(action).__name__ != "DeprecatedStoreConstAction"]
    out.write_text(json.dumps(rows))


def _add_sglang(parser: argparse.ArgumentParser) -> None:
    from sglang.srt.server_args import ServerArgs

    ServerArgs.add_cli_args(parser)


def row(action: argparse.Action) -> dict[str, Any]:
    """What a Flag needs of an action, as plain values."""
    kind = _KINDS.get(getattr(action.type, "__name__", ""), "str")
    names = list(action.option_strings)
    if isinstance(action, argparse.BooleanOptionalAction):
        kind, names = "tri", [name for name in names if not name.startswith("--no-")]
    elif action.nargs == 0:
        kind = "off" if isinstance(action, argparse._StoreFalseAction) else "switch"
    return {
        "names": names,
        "dest": action.dest,
        "kind": kind,
        "default": _plain(action.default),
        "choices": [_plain(choice) for choice in action.choices or ()],
        "nargs": action.nargs if action.nargs in {"+", "*", "?"} else None,
        "help": " ".join((action.help or "").split()) if action.help != argparse.SUPPRESS else "",
    }


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)


if __name__ == "__main__":
    main()
