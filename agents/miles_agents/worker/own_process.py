"""What a worker, or its zygote, does to the process that it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence

_COMM_BYTES = 15


def name_process(name: str) -> None:
    """What ``ps -o comm`` and ``top`` show, as far as it fits. The command line of a forked worker is its zygote's."""
    with open("/proc/self/comm", "wb") as file:
        file.write(name.encode()[:_COMM_BYTES])


def set_up_logging() -> None:
    """To stderr, before any module of the user's has a chance to. Nothing if there is a handler already."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def with_entries(path: Sequence[str], entries: Sequence[str]) -> list[str]:
    """``sys.path`` with the run's own entries behind those that it has."""
    return [*path, *(entry for entry in entries if entry not in path)]
