"""A rollout function that makes nothing: engines and router stay up for whoever asks them by hand.

``--rollout-function-path miles.rollout.sleep_rollout.sleep``; the run is ended with Ctrl-C.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import NoReturn

from miles.rollout.data_source import DataSource

logger = logging.getLogger(__name__)
TOLD_EVERY_S = 3600.0


async def sleep(args: Namespace, rollout_id: int, data_source: DataSource, evaluation: bool = False) -> NoReturn:
    """Wait until the run ends. Where the router is goes to the log, at once and every hour."""
    host, port = getattr(args, "sglang_router_ip", None), getattr(args, "sglang_router_port", None)
    while True:
        logger.warning("rollout %d makes nothing; the router is http://%s:%s", rollout_id, host, port)
        await asyncio.sleep(TOLD_EVERY_S)
