"""Agents on this machine, for a controller on this machine: a laptop, one node, and tests.

``LocalAgents`` consumes a list of node names. It produces one ``miles agent`` process per node (which becomes the
node's reaper), each with its stdin as lifeline: when this process dies, however, the pipes end and the agents notice.
It waits for exits through pidfds, and on leaving for all of them, each wait with a deadline.

Invariants: an exit is reported to the controller as proof of death only if the reaper ended by itself, because only
then has it seen the node clean; after ``__aexit__`` no process started here is left, or an error names it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import psutil

from miles_agents.errors import EnvironmentFault
from miles_agents.timings import Timings

log = logging.getLogger(__name__)

_TAIL_BYTES = 4096
_TAIL_LINES = 20


class ControllerLike(Protocol):
    """What is needed of a controller."""

    @property
    def address(self) -> str:
        """Where agents dial: ``tcp://host:port``."""

    def issue_key(self, node: str) -> str:
        """A new key bundle for that node, one line of JSON."""

    def report_node_exit(self, node: str, evidence: str) -> None:
        """The node's reaper has ended by itself: nothing of the node is left running."""


class CannotStartAgent(EnvironmentFault):
    """The process of a local agent could not be started."""

    code = "E-LOCAL-001"


class AgentWouldNotStop(EnvironmentFault):
    """A local agent's processes did not end, although they were killed."""

    code = "E-LOCAL-002"


@dataclass(slots=True)
class LocalAgent:
    """One agent's process. ``exited`` holds the exit code (negative: the signal) once it has ended."""

    node: str
    process: subprocess.Popen[bytes]
    pidfd: int
    log_path: Path
    exited: asyncio.Future[int] = field(repr=False)

    @property
    def pid(self) -> int:
        """Of the reaper, which is the parent of the agent."""
        return self.process.pid

    def log_tail(self) -> str:
        """The last 20 lines that the agent and its reaper wrote to stderr."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError as error:
            return f"(log {self.log_path} cannot be read: {error})"
        return "\n".join(text.splitlines()[-_TAIL_LINES:]) or "(the log is empty)"


class LocalAgents:
    """Async context manager: starts an agent per node, stops them on leaving.

    Args:
        controller: For whom. It must listen before this is entered, and should have said goodbye to its agents
            before this is left: agents that lose only their lifeline wait for ``fence_s`` first.
        nodes: Their names.
        run_dir: Logs go to ``<run_dir>/logs/agent-<node>.log``; also passed to the agents.
        cpu_slots: Slots that each node offers where there is no GPU; None: the agent's default.
        timings: Passed to the agents; None: their defaults.
        env: The agents' whole environment; None: this process's.
        grace_s: Wait after each step of stopping: end of lifeline, SIGTERM, SIGKILL of the agent, of the reaper.
    """

    def __init__(
        self,
        controller: ControllerLike,
        nodes: Sequence[str],
        *,
        run_dir: Path,
        cpu_slots: int | None = None,
        timings: Timings | None = None,
        env: Mapping[str, str] | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self._controller = controller
        self._nodes = list(nodes)
        self._run_dir = run_dir
        self._flags = _flags(controller.address, run_dir, cpu_slots, timings)
        self._env = dict(os.environ if env is None else env)
        self._grace_s = grace_s
        self._agents: dict[str, LocalAgent] = {}

    @property
    def agents(self) -> Mapping[str, LocalAgent]:
        """By node, also those that have ended."""
        return self._agents

    async def __aenter__(self) -> LocalAgents:
        try:
            for node in self._nodes:
                self._start(node)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def _start(self, node: str) -> None:
        key = self._controller.issue_key(node).rstrip("\n").encode() + b"\n"
        log_path = self._run_dir / "logs" / f"agent-{node}.log"
        argv = [sys.executable, "-m", "miles_launcher.cli", "agent", "--node", node, *self._flags]
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with _private_log(log_path) as stderr:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=stderr,
                    stderr=stderr,
                    env=self._env,
                    start_new_session=True,  # Ctrl-C is the controller's to handle, in order
                    bufsize=0,
                )
        except OSError as error:
            raise CannotStartAgent(
                f"agent of {node} cannot be started",
                evidence=f"{error}; command: {' '.join(argv)}",
                advice="Free what the evidence names (processes, memory, disk space) and start again.",
            ) from error
        loop = asyncio.get_running_loop()
        agent = LocalAgent(node, process, os.pidfd_open(process.pid), log_path, loop.create_future())
        self._agents[node] = agent
        loop.add_reader(agent.pidfd, self._on_exit, agent)
        try:
            _lifeline(process).write(key)
        except BrokenPipeError:
            log.warning("agent of %s ended before it took its key", node)  # its exit is on the way

    def _on_exit(self, agent: LocalAgent) -> None:
        asyncio.get_running_loop().remove_reader(agent.pidfd)
        os.close(agent.pidfd)
        code = agent.process.wait()  # at once: the pidfd was readable
        _close_lifeline(agent.process)
        agent.exited.set_result(code)
        if code < 0:
            # Nobody has seen the node clean, so this proves nothing: the controller's own verdict has to wait.
            log.error("reaper of %s was killed by %s", agent.node, signal.Signals(-code).name)
            return
        evidence = f"reaper of {agent.node} (pid {agent.pid}) exited with code {code}; log {agent.log_path} ends:\n"
        self._controller.report_node_exit(agent.node, evidence + agent.log_tail())

    def _running(self) -> list[LocalAgent]:
        return [agent for agent in self._agents.values() if not agent.exited.done()]

    async def _stop(self) -> None:
        """End of lifeline, SIGTERM, SIGKILL of the agent (the reaper then cleans up), SIGKILL of the reaper."""
        try:
            for step in (_close_lifeline, _terminate, _kill_below, _kill):
                running = self._running()
                if not running:
                    return
                for agent in running:
                    step(agent.process)
                await asyncio.wait([agent.exited for agent in running], timeout=self._grace_s)
        finally:  # also when cancelled: the ends of lifelines are on their way, only nobody watches any more
            stuck = self._running()
            for agent in stuck:
                asyncio.get_running_loop().remove_reader(agent.pidfd)
                os.close(agent.pidfd)
        if stuck:
            raise AgentWouldNotStop(
                f"agents of {', '.join(agent.node for agent in stuck)} would not stop",
                evidence="\n".join(f"{agent.node}: pid {agent.pid}, {_state(agent.pid)}" for agent in stuck),
                advice="A process in state D waits for a device or a file server; look at dmesg on this machine.",
            )


def _flags(address: str, run_dir: Path, cpu_slots: int | None, timings: Timings | None) -> list[str]:
    flags = ["--controller", address, "--run-dir", str(run_dir)]
    if cpu_slots is not None:
        flags += ["--cpu-slots", str(cpu_slots)]
    if timings is not None:
        for name in ("beat_s", "suspect_s", "fence_s", "dead_s"):
            flags += ["--" + name.replace("_", "-"), str(getattr(timings, name))]
    return flags


def _private_log(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab", buffering=0)


def _lifeline(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise AssertionError("started with stdin=PIPE")
    return process.stdin


def _close_lifeline(process: subprocess.Popen[bytes]) -> None:
    _lifeline(process).close()


def _terminate(process: subprocess.Popen[bytes]) -> None:
    process.terminate()


def _kill_below(process: subprocess.Popen[bytes]) -> None:
    """Kill the reaper's children, and let it go on if somebody stopped it, so that it can do the rest."""
    try:
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        pass  # it ended meanwhile


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()


def _state(pid: int) -> str:
    try:
        return f"state {psutil.Process(pid).status()}"
    except psutil.NoSuchProcess:
        return "gone by now"
