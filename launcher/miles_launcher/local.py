"""Agents on this machine, for a controller on this machine: a laptop, one node, and tests.

``LocalAgents`` consumes a list of node names. It produces one ``miles agent`` process per node (which becomes the
node's reaper), each with its stdin as lifeline: when this process dies, however, the pipes end and the agents notice.
It waits for exits through pidfds, and on leaving for all of them, each wait with a deadline.

Invariants: an exit is reported to the controller as proof of death only if the reaper ended by itself and says that
the node is clean; after ``__aexit__`` no reaper started here is left, and an error names those that cannot vouch for
their node.
"""

from __future__ import annotations

import asyncio
import contextlib
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

from miles_agents.agent.reaper import EXIT_NOT_CLEAN
from miles_agents.errors import EnvironmentFault
from miles_agents.runtime_dir import sweep
from miles_agents.timings import Timings
from miles_agents.worker.spec import check_start

log = logging.getLogger(__name__)

_TAIL_BYTES = 4096
_TAIL_LINES = 20


class ControllerLike(Protocol):
    """What is needed of a controller."""

    @property
    def local_address(self) -> str:
        """Where agents of this machine dial: ``unix:///path``, or ``tcp://host:port``."""

    def issue_key(self, node: str) -> str:
        """A new key bundle for that node, one line of JSON."""

    def report_node_exit(self, node: str, evidence: str, *, reaper: int) -> None:
        """The node's reaper, of this pid, has ended by itself: nothing that it started is left running."""

    async def dismiss(self, *nodes: str, reason: str) -> None:
        """Say goodbye to the agents of these nodes and wait, for a bounded time, until they have left in good order."""


class CannotStartAgent(EnvironmentFault):
    """The process of a local agent could not be started."""

    code = "E-LOCAL-001"


class AgentWouldNotStop(EnvironmentFault):
    """A local agent's reaper did not end by itself, so nothing vouches for what it started."""

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
        self._flags = _flags(controller.local_address, run_dir, cpu_slots, timings, check_start(preload, "auto"))
        if store_bytes is not None:
            self._flags += ["--store-bytes", str(store_bytes)]
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

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            reason = "its starter is done" if kind is None else f"its starter failed: {kind.__name__}"
            await self._controller.dismiss(*self._nodes, reason=reason)
        finally:
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
        story = (
            f"reaper of {agent.node} (pid {agent.pid}) {_ending(code)}; log {agent.log_path} ends:\n{agent.log_tail()}"
        )
        if code < 0 or code == EXIT_NOT_CLEAN:
            log.error("no proof that the node is clean: %s", story)  # the controller's own verdict has to wait
        else:
            self._controller.report_node_exit(agent.node, story, reaper=agent.pid)

    def _running(self) -> list[LocalAgent]:
        return [agent for agent in self._agents.values() if not agent.exited.done()]

    async def _stop(self) -> None:
        """End of lifeline, SIGTERM, kill of the agent (the reaper then cleans up), kill of everything."""
        forced: list[str] = []
        try:
            for step in (_close_lifeline, _terminate, _kill_agent, _kill_all):
                running = self._running()
                if step is _kill_all:
                    forced = [f"{agent.node}: pid {agent.pid}, {_state(agent.pid)}" for agent in running]
                for agent in running:
                    step(agent.process)
                if running:
                    await asyncio.wait([agent.exited for agent in running], timeout=self._grace_s)
        finally:  # also when cancelled: the ends of lifelines are on their way, only nobody watches any more
            for agent in self._running():
                asyncio.get_running_loop().remove_reader(agent.pidfd)
                os.close(agent.pidfd)
        sweep()  # an agent that was killed could not remove its runtime directory
        if forced:
            raise AgentWouldNotStop(
                "local agents had to be killed together with their reapers",
                evidence="\n".join(forced),
                advice="Look for leftovers with ps, and for processes in state D in dmesg: they wait for a device "
                "or a file server.",
            )


def _flags(
    address: str, run_dir: Path, cpu_slots: int | None, timings: Timings | None, preload: tuple[str, ...] | None
) -> list[str]:
    flags = ["--controller", address, "--run-dir", str(run_dir)]
    if cpu_slots is not None:
        flags += ["--cpu-slots", str(cpu_slots)]
    if timings is not None:
        for name in ("beat_s", "suspect_s", "fence_s", "dead_s"):
            flags += ["--" + name.replace("_", "-"), str(getattr(timings, name))]
    if preload is not None:
        flags += ["--preload", ",".join(preload)]
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


def _kill_agent(process: subprocess.Popen[bytes]) -> None:
    """The reaper kills its agent without grace; it is woken first, in case somebody stopped it."""
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGQUIT)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Also what is below the reaper, as far as it can be seen now."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil compares start times: a reused pid is not hit


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _state(pid: int) -> str:
    try:
        return f"state {psutil.Process(pid).status()}"
    except psutil.NoSuchProcess:
        return "gone by now"
