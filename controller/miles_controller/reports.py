"""What agents report: endpoints of the controller. An agent can only speak of its own workers; others are ignored."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from miles_agents.agent.logs import last_words
from miles_agents.rpc.context import current_call
from miles_agents.rpc.errors import WorkerDied
from miles_agents.wire.envelope import Address
from miles_controller.fabric import Node
from miles_controller.log_intake import LogIntake
from miles_controller.remote_lines import fit_lines, text_bytes

if TYPE_CHECKING:
    from miles_controller.controller import Controller

remote_logger = logging.getLogger("miles.remote")


class Reports:
    """See the module's docstring."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._logs = LogIntake(self._show, lambda: self._drop("log lines that nobody has room for"))

    def endpoints(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Name to function."""
        return {
            "worker_exited": self.worker_exited,
            "worker_silent": self.worker_silent,
            "worker_heard": self.worker_heard,
            "call_overdue": self.call_overdue,
            "service_changed": self.service_changed,
            "zygote_news": self.zygote_news,
            "take_logs": self.take_logs,
        }

    async def worker_exited(self, mesh: int, rank: int, incarnation: int, death: list[Any]) -> None:
        """A worker of the calling agent is gone; ``death``: cause, whether it was asked to end, its last lines."""
        cause, expected, tail = death
        address = Address(mesh, rank, incarnation)
        node = self._reporter(address)
        if node is None:
            return
        label = self._controller.fabric.workers[mesh, rank].label
        error = WorkerDied(
            f"{label} on {node.name} died: {cause}",
            evidence=f"its last lines:\n{last_words(tail)}",
            advice="Read its last lines and its log file.",
            actor=label,
            node=node.name,
            exit=cause,
            may_have_run=False,
        )
        self._controller.on_worker_exited(address, error, expected=expected)

    async def worker_silent(self, mesh: int, rank: int, incarnation: int, silence_s: float, evidence: str) -> None:
        """A worker gives no sign of life."""
        supervisor = self._controller.supervisor_of(mesh)
        if supervisor is not None and self._reporter(Address(mesh, rank, incarnation)) is not None:
            supervisor.on_silent(rank, incarnation, silence_s, evidence)

    async def worker_heard(self, mesh: int, rank: int, incarnation: int) -> None:
        """It does again."""
        supervisor = self._controller.supervisor_of(mesh)
        if supervisor is not None and self._reporter(Address(mesh, rank, incarnation)) is not None:
            supervisor.on_heard(rank, incarnation)

    async def call_overdue(self, mesh: int, rank: int, incarnation: int, method: str, age_s: float) -> None:
        """A call between workers of the calling agent, which never came by here, is much older than usual."""
        supervisor = self._controller.supervisor_of(mesh)
        if supervisor is not None and self._reporter(Address(mesh, rank, incarnation)) is not None:
            told = supervisor.report_overdue(rank, method, age_s)
            self._controller.background(told, f"overdue {supervisor.name}[{rank}]")

    async def service_changed(self, node: str, name: str, change: dict[str, Any]) -> None:
        """A service changed its phase."""
        reporter = self._calling_agent()
        if reporter is not None and reporter.name == node:
            self._controller.services.on_change(reporter, name, change)

    async def zygote_news(self, node: str, kind: str, text: str) -> None:
        """A zygote was refused, or failed and is replaced: workers start slower than they could."""
        reporter = self._calling_agent()
        if reporter is not None and reporter.name == node and kind in ("zygote_refused", "zygote_failed"):
            self._controller.events.emit(kind, node, text)

    async def take_logs(self, node: str, batch: list[list[Any]]) -> float:
        """Log lines of processes of the calling agent: [source, time, text, ranks that repeated it].

        Returns for how many seconds it is to send no more.
        """
        reporter = self._calling_agent()
        if reporter is None or reporter.name != node:
            self._drop("log lines in another's name")
            return 0.0
        return self._logs.take(self._fit(node, batch), text_bytes(batch))

    def _fit(self, node: str, batch: object) -> Iterator[str]:
        for line in fit_lines(node, batch):
            if line is None:
                self._drop("log lines in another's name")
            else:
                yield line

    def _show(self, line: str) -> None:
        try:
            remote_logger.info("%s", line)
        except Exception as error:  # noqa: BLE001  boundary: handlers are the embedder's
            self._drop(f"showing a log line raised {type(error).__name__}")

    def _drop(self, reason: str) -> None:
        self._controller.fabric.link.stats.drop(reason)

    def close(self) -> None:
        """Show what was not shown yet."""
        self._logs.close()

    def _calling_agent(self) -> Node | None:
        return self._controller.fabric.agent_at(current_call().source)

    def _reporter(self, address: Address) -> Node | None:
        """The calling agent, if the worker is its own and of this incarnation."""
        node = self._calling_agent()
        route = self._controller.fabric.workers.get((address.mesh, address.rank))
        if node is None or route is None or route.node is not node or route.address != address:
            return None
        return node
