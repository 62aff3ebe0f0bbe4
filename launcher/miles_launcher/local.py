"""Agents on this machine, for a controller on this machine: a laptop, one node, and tests.

``LocalAgents`` consumes a list of node names. It produces one ``miles agent`` process per node (which becomes the
node's reaper), each with its stdin as lifeline: when this process dies, however, the pipes end and the agents notice.
``agents.py`` has the processes.

Invariants: an exit is reported to the controller as proof of death only if the reaper ended by itself and says that
the node is clean; after ``__aexit__`` no reaper started here is left, and an error names those that cannot vouch for
their node.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles_agents.agent.reaper import EXIT_NOT_CLEAN
from miles_agents.errors import EnvironmentFault
from miles_agents.runtime_dir import sweep
from miles_agents.timings import Timings
from miles_agents.worker.spec import check_start
from miles_launcher.agents import (
    AgentCommand,
    AgentProcess,
    AgentProcesses,
    CannotStartAgent,
    ControllerLike,
    kill,
    kill_agent,
    terminate,
)

__all__ = ["AgentWouldNotStop", "CannotStartAgent", "ControllerLike", "LocalAgents", "agent_flags"]

log = logging.getLogger(__name__)


class AgentWouldNotStop(EnvironmentFault):
    """A local agent's reaper did not end by itself, so nothing vouches for what it started."""

    code = "E-LOCAL-002"


class LocalAgents:
    """Async context manager: starts an agent per node, stops them on leaving.

    Args:
        controller: For whom. It must listen before this is entered; it dismisses the agents when this is left.
        nodes: Their names.
        run_dir: Logs go to ``<run_dir>/logs/agent-<node>.log``; also passed to the agents.
        cpu_slots: Slots that each node offers where there is no GPU; None: the agent's default.
        timings: Passed to the agents; None: their defaults.
        preload: Modules to have imported in a zygote of each agent, ready when a mesh with this ``preload`` is spawned.
        store_bytes: Size of each agent's shared-memory store; None: a tenth of the machine's memory.
        env: The agents' whole environment; None: this process's.
        grace_s: Wait after each step of stopping: end of lifeline, SIGTERM, kill of the agent, kill of everything.
    """

    def __init__(
        self,
        controller: ControllerLike,
        nodes: Sequence[str],
        *,
        run_dir: Path,
        cpu_slots: int | None = None,
        timings: Timings | None = None,
        preload: Sequence[str] | None = None,
        store_bytes: int | None = None,
        env: Mapping[str, str] | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self._controller = controller
        self._nodes = list(nodes)
        self._run_dir = run_dir
        self._flags = ["--controller", controller.local_address, "--run-dir", str(run_dir)]
        self._flags += agent_flags(
            cpu_slots=cpu_slots,
            timings=timings,
            preload=check_start(preload, "auto"),
            store_bytes=store_bytes,
        )
        self._env = dict(os.environ if env is None else env)
        self._grace_s = grace_s
        self._processes: AgentProcesses | None = None

    @property
    def agents(self) -> Mapping[str, AgentProcess]:
        """By node, also those that have ended. ``pid`` is that of the reaper, which is the parent of the agent."""
        return {} if self._processes is None else self._processes.by_node

    async def __aenter__(self) -> LocalAgents:
        processes = self._processes = AgentProcesses(self._on_exit)
        try:
            for node in self._nodes:
                processes.start(self._command(node))
        except BaseException:
            await self._stop(processes)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._processes is None:
            return
        try:
            reason = "its starter is done" if kind is None else f"its starter failed: {kind.__name__}"
            await self._controller.dismiss(*self._nodes, reason=reason)
        finally:
            await self._stop(self._processes)

    def _command(self, node: str) -> AgentCommand:
        key = self._controller.issue_key(node).rstrip("\n").encode() + b"\n"
        argv = (sys.executable, "-m", "miles_launcher.cli", "agent", "--node", node, *self._flags)
        return AgentCommand(node, argv, key, self._env, self._run_dir / "logs" / f"agent-{node}.log")

    def _on_exit(self, agent: AgentProcess) -> None:
        code = agent.exited.result()
        story = (
            f"reaper of {agent.node} (pid {agent.pid}) {agent.ending()}; log {agent.log_path} ends:\n{agent.log_tail()}"
        )
        if code < 0 or code == EXIT_NOT_CLEAN:
            log.error("no proof that the node is clean: %s", story)  # the controller's own verdict has to wait
        else:
            self._controller.report_node_exit(agent.node, story, reaper=agent.pid)

    async def _stop(self, processes: AgentProcesses) -> None:
        """End of lifeline, SIGTERM, kill of the agent (the reaper then cleans up), kill of everything."""
        steps = (processes.close_lifeline, terminate, kill_agent, kill)
        try:
            forced = await processes.stop(steps, grace_s=self._grace_s)
        finally:
            sweep()  # an agent that was killed could not remove its runtime directory
        if forced:
            raise AgentWouldNotStop(
                "local agents had to be killed together with their reapers",
                evidence="\n".join(forced),
                advice="Look for leftovers with ps, and for processes in state D in dmesg: they wait for a device "
                "or a file server.",
            )


def agent_flags(
    *,
    cpu_slots: int | None = None,
    timings: Timings | None = None,
    preload: tuple[str, ...] | None = None,
    store_bytes: int | None = None,
    interface: str | None = None,
) -> list[str]:
    """Flags of ``miles agent`` about what its node offers and prepares."""
    flags: list[str] = []
    if cpu_slots is not None:
        flags += ["--cpu-slots", str(cpu_slots)]
    if timings is not None:
        for name in ("beat_s", "suspect_s", "fence_s", "dead_s"):
            flags += ["--" + name.replace("_", "-"), str(getattr(timings, name))]
    if preload is not None:
        flags += ["--preload", ",".join(preload)]
    if store_bytes is not None:
        flags += ["--store-bytes", str(store_bytes)]
    if interface is not None:
        flags += ["--interface", interface]
    return flags
