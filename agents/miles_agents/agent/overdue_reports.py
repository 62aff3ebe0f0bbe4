"""Calls between workers of one node pass by no other switch than their agent's: it tells of those that take very long.

Consumes: the agent's tick. Produces: ``call_overdue`` reports to the controller, which fetches the stack of whoever
owes the answer. Invariant: a call is told once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_agents.agent.worker_pool import nobody_cares
from miles_agents.rpc.context import outside_of_calls
from miles_agents.rpc.inflight import Passed
from miles_agents.rpc.mesh import ActorMesh
from miles_agents.rpc.overdue import CHECK_S, OverdueWatch
from miles_agents.wire.envelope import Address, Target

if TYPE_CHECKING:
    from miles_agents.agent.agent import Agent


class OverdueReports:
    """See the module's docstring."""

    def __init__(self, agent: Agent, controller: ActorMesh, overdue_s: float) -> None:
        self._agent = agent
        self._controller = controller
        self._watch = OverdueWatch(agent.switch.in_flight, overdue_s, self._is_between_own)
        self._next_at = agent.loop.time() + CHECK_S

    def tick(self) -> None:
        """On every beat of the agent."""
        now = self._agent.loop.time()
        if now < self._next_at:
            return
        self._next_at = now + CHECK_S
        for passed in self._watch.news(now):
            report = self._controller.endpoint("call_overdue").broadcast
            told = outside_of_calls().run(report, *passed.receiver, passed.method, now - passed.since)
            told.add_done_callback(nobody_cares)

    def _is_between_own(self, passed: Passed) -> bool:
        return self._is_own(passed.key.source) and self._is_own(passed.receiver)

    def _is_own(self, address: Address) -> bool:
        workers = self._agent.workers
        found = workers.resolve(address.mesh, Target(address.rank, address.incarnation, 0)) if workers else None
        return getattr(found, "address", None) == address
