"""Starts sglang-router: ``python -m miles.backends.sglang_utils.launch_router HOST PORTS ARGUMENTS``.

Consumes: the host; ports as JSON by name (``http``, ``metrics``); the router's options as a JSON object by flag
(``router_policy``, ...); the key as ``launch_key`` says. Requests to the router need the key; it adds it to those
that it makes itself.
"""

from __future__ import annotations

import argparse
import json
import sys


def main() -> None:
    """Take the key, build the arguments, serve until ended."""
    from miles.backends.sglang_utils.launch_key import take_key

    key = take_key({})
    host, ports, wanted = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

    from sglang_router.launch_router import launch_router
    from sglang_router.router_args import RouterArgs

    arguments = RouterArgs.from_cli_args(argparse.Namespace(**wanted), use_router_prefix=True)
    arguments.host, arguments.port, arguments.api_key = host, ports["http"], str(key) or None
    arguments.prometheus_host, arguments.prometheus_port = host, ports["metrics"]
    launch_router(arguments)


if __name__ == "__main__":
    main()
