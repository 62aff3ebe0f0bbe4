"""A thousand hosts started on virtual time, some of which hang and some refuse: how long, and what is told."""

from __future__ import annotations

import asyncio
import random

from miles_agents.errors import EnvironmentFault
from miles_agents.virtual_time import VirtualLoop
from miles_launcher.bounded_start import AT_ONCE, Report, start_all

TYPICAL_S, SPREAD = 3.0, 0.4
"""Median of a start (ssh, Python, joining), and the deviation of its logarithm: one in twenty takes twice as long."""
REFUSES_S = 0.5


class RefusedToStart(EnvironmentFault):
    """What a host says here that does not let us in."""

    code = "E-SIM-001"


class Scripted:
    """``bounded_start.Starter``: what happens to each host was drawn before."""

    def __init__(self, hangs: set[str], refuses: set[str], seed: int) -> None:
        self._hangs, self._refuses = hangs, refuses
        self._random = random.Random(seed)
        self.at_work = self.most_at_work = self.given_up = 0

    async def start(self, node: str) -> None:
        """As it was drawn."""
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            if node in self._hangs:
                await asyncio.get_running_loop().create_future()
            if node in self._refuses:
                await asyncio.sleep(REFUSES_S)
                raise RefusedToStart(
                    f"{node} does not let us in",
                    evidence="Permission denied (publickey).",
                    advice="Add your key there.",
                )
            await asyncio.sleep(TYPICAL_S * self._random.lognormvariate(0.0, SPREAD))
        finally:
            self.at_work -= 1

    async def give_up(self, node: str) -> None:
        """Nothing is left."""
        self.given_up += 1

    def doing(self, node: str) -> str:
        """Of those that hang."""
        return "the answer of sshd"


def simulate(
    num_hosts: int, *, at_once: int = AT_ONCE, timeout_s: float = 120.0, seed: int = 0
) -> tuple[Report, Scripted]:
    """One percent hangs, one percent refuses. Same seed, same report."""
    names = [f"node{number:04}" for number in range(num_hosts)]
    drawn = random.Random(seed).sample(names, 2 * (num_hosts // 100))
    starter = Scripted(set(drawn[::2]), set(drawn[1::2]), seed)
    loop = VirtualLoop(limit_s=24 * 3600.0)
    try:
        report = loop.run_until_complete(start_all(names, starter, at_once=at_once, timeout_s=timeout_s))
    finally:
        loop.close()
    return report, starter
