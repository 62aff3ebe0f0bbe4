"""Start many nodes, some at a time, and know of each what became of it.

Consumes a ``Starter``, which knows how one node is started and how that is given up. Produces a ``Report``. Waits for:
the starts, each with a deadline of its own that begins when its turn comes. Invariants: no more than ``at_once`` are
under way; every node has either joined or failed with a reason when ``start_all`` returns; what was begun for a node
that failed has been given up. Nothing here knows of processes or networks, so that it runs on virtual time, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from miles_agents.errors import EnvironmentFault, MilesError

AT_ONCE = 64
"""Starts under way, unless told otherwise: what a shared disk and one machine's processes bear."""


class StartTooSlow(EnvironmentFault):
    """A node did not join in its time, and did not say why."""

    code = "E-START-001"


class Starter(Protocol):
    """How one node is started."""

    async def start(self, node: str) -> None:
        """Until it has joined. Raises MilesError: why it cannot."""

    async def give_up(self, node: str) -> None:
        """End what was begun for it, in bounded time. Called once for each start that raised or was cancelled."""

    def doing(self, node: str) -> str:
        """What is being waited for, for people."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of each node, in the order given.

    Attributes:
        joined: Node to the seconds from its turn until it had joined.
        failed: Node to why it cannot be used.
        seconds: Of all.
    """

    joined: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, MilesError] = field(default_factory=dict)
    seconds: float = 0.0


async def start_all(
    nodes: Sequence[str], starter: Starter, *, at_once: int = AT_ONCE, timeout_s: float = 120.0
) -> Report:
    """Start all nodes; a node that fails keeps no other from being started.

    Args:
        timeout_s: For each, from its turn on.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    turn = asyncio.Semaphore(at_once)
    joined: dict[str, float] = {}
    failed: dict[str, MilesError] = {}

    async def one(node: str) -> None:
        async with turn:
            at = loop.time()
            try:
                async with asyncio.timeout(timeout_s):
                    await starter.start(node)
            except TimeoutError:
                failed[node] = _too_slow(node, timeout_s, starter.doing(node))
            except MilesError as error:
                failed[node] = error
            except BaseException:
                await starter.give_up(node)
                raise
            else:
                joined[node] = loop.time() - at
                return
            await starter.give_up(node)

    async with asyncio.TaskGroup() as tasks:
        for node in nodes:
            tasks.create_task(one(node), name=f"start of {node}")
    return Report(
        {node: joined[node] for node in nodes if node in joined},
        {node: failed[node] for node in nodes if node in failed},
        loop.time() - begun,
    )


def _too_slow(node: str, timeout_s: float, doing: str) -> StartTooSlow:
    return StartTooSlow(
        f"{node} has not joined within {timeout_s:g} s",
        evidence=f"waiting for: {doing}",
        advice="Look at what it waits for on that machine; give it more time with --start-timeout.",
    )
