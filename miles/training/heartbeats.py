"""Ranks of the trainer that say nothing: stopped, swapped out, hanging without letting other threads run.

Consumes: answers of the ranks' ``progress``, which comes from a thread of its own, so that long passes and collectives
do not keep it. Produces: the end of a rank that hangs, after which its group ends and is recovered. Waits for: answers,
each with a deadline. Invariant: a rank is ended only after ``--trainer-heartbeat-checker-failure-threshold`` heartbeats
in a row without an answer, and none is looked at in the first seconds of a group's life
(``--trainer-heartbeat-checker-first-wait``), in which libraries are loaded and kernels compiled. A group that is being
brought back is watched like any other: its life begins with its processes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from miles.training.keeper import Keeper
from miles.training.recovery_plan import judge_heartbeats
from miles_agents.errors import MilesError
from miles_agents.rpc.errors import DeadlineExceeded
from miles_controller import OwnedMesh

logger = logging.getLogger(__name__)


async def watch_heartbeats(keeper: Keeper, mesh: OwnedMesh, config: Mapping[str, Any]) -> None:
    """Until the mesh has failed, or a rank was ended."""
    await asyncio.sleep(float(config["trainer_heartbeat_checker_first_wait"]))
    interval_s = float(config["trainer_heartbeat_checker_interval"])
    timeout_s = float(config["trainer_heartbeat_checker_timeout"])
    threshold = int(config["trainer_heartbeat_checker_failure_threshold"])
    misses: dict[int, int] = {}
    while mesh.failure is None:
        answers = await mesh.options(timeout_s=timeout_s, return_exceptions=True).progress.call()
        answered = {rank: not isinstance(answer, DeadlineExceeded) for rank, answer in enumerate(answers.values)}
        misses, hanging = judge_heartbeats(misses, answered, threshold)
        for rank in hanging if mesh.failure is None else ():
            keeper.note = f"rank {rank} left out {threshold} heartbeats in a row and was killed"
            logger.warning("%s: %s", mesh.name, keeper.note)
            try:
                await mesh.kill(rank=rank)
            except MilesError as error:
                logger.warning("%s[%d] could not be killed: %s", mesh.name, rank, error.what)
        if hanging:
            return
        await asyncio.sleep(interval_s)
