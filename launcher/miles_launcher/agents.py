"""What all launchers share: one process per node, whose stdin brings the key and is the lifeline of what it started.

``AgentProcesses`` consumes ``AgentCommand``s: the agent's own reaper (``local``), or what reaches it (``ssh``). It
produces exits, told once each to whoever made it, and what was written to stdout, line by line, where that is wanted.
It waits for exits through pidfds, and in ``stop`` for all, each wait with a deadline.

Invariants: nothing here blocks the loop; the first input is written before anything else and stdin stays open until
``stop``; after ``stop`` no process started here is left, and the names of those that had to be forced are returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import psutil

from miles_agents.errors import EnvironmentFault

log = logging.getLogger(__name__)

_TAIL_BYTES = 4096
_TAIL_LINES = 20
_READ_BYTES = 1 << 16
_LINE_BYTES = 1 << 16
"""A longer line on stdout is cut: it is nothing of ours."""


class ControllerLike(Protocol):
    """What launchers need of a controller."""

    @property
    def local_address(self) -> str:
        """Where agents of this machine dial: ``unix:///path``, or ``tcp://host:port``."""

    def issue_key(self, node: str) -> str:
        """A new key bundle for that node, one line of JSON."""

    def report_node_exit(self, node: str, evidence: str, *, reaper: int) -> None:
        """The node's reaper, of this pid, has ended by itself: nothing that it started is left running."""

    async def dismiss(self, *nodes: str, reason: str) -> object:
        """Say goodbye to the agents of these nodes and wait, for a bounded time, until they have left in good order.
        Returns the names of those that have not."""


class CannotStartAgent(EnvironmentFault):
    """The process that is or reaches an agent could not be started on this machine."""

    code = "E-LOCAL-001"


@dataclass(frozen=True, slots=True)
class AgentCommand:
    """What is started for a node.

    Attributes:
        argv: Command line; nothing secret.
        first_input: Written to its stdin at once: the key line, where it is needed.
        env: Its whole environment.
        log_path: Its stderr is appended here, and its stdout unless ``on_line`` takes that.
        on_line: Called with each line of its stdout, without the newline.
    """

    node: str
    argv: tuple[str, ...]
    first_input: bytes
    env: Mapping[str, str]
    log_path: Path
    on_line: Callable[[str], None] | None = None


@dataclass(slots=True)
class AgentProcess:
    """One process. ``exited`` holds the exit code (negative: the signal) once it has ended."""

    node: str
    process: subprocess.Popen[bytes]
    pidfd: int
    log_path: Path
    exited: asyncio.Future[int] = field(repr=False)
    on_line: Callable[[str], None] | None = None
    unwritten: bytearray = field(default_factory=bytearray, repr=False)
    unread: bytearray = field(default_factory=bytearray, repr=False)
    log_start: int = 0

    @property
    def pid(self) -> int:
        """Of the process that was started here."""
        return self.process.pid

    def log_tail(self) -> str:
        """The last 20 lines that this process, and what it reaches, wrote to stderr."""
        try:
            with self.log_path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self.log_start, end - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError as error:
            return f"(log {self.log_path} cannot be read: {error})"
        return "\n".join(text.splitlines()[-_TAIL_LINES:]) or "(the log is empty)"

    def ending(self) -> str:
        """How it ended, for people."""
        code = self.exited.result()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


Step = Callable[[AgentProcess], None]
"""A way to have a process end."""


class AgentProcesses:
    """See the module. ``on_exit``: called once for each process that has ended, with ``exited`` set."""

    def __init__(self, on_exit: Callable[[AgentProcess], None]) -> None:
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self.by_node: dict[str, AgentProcess] = {}

    def start(self, command: AgentCommand) -> AgentProcess:
        """Start one. Raises CannotStartAgent."""
        try:
            command.log_path.parent.mkdir(parents=True, exist_ok=True)
            with _private_log(command.log_path) as stderr:
                log_start = os.fstat(stderr.fileno()).st_size
                process = subprocess.Popen(
                    command.argv,
                    stdin=subprocess.PIPE,
                    stdout=stderr if command.on_line is None else subprocess.PIPE,
                    stderr=stderr,
                    env=dict(command.env),
                    start_new_session=True,  # Ctrl-C is the controller's to handle, in order
                    bufsize=0,
                )
        except OSError as error:
            raise CannotStartAgent(
                f"agent of {command.node} cannot be started",
                evidence=f"{error}; command: {' '.join(command.argv)}",
                advice="Free what the evidence names (processes, memory, disk space), or install it, and start again.",
            ) from error
        agent = AgentProcess(
            command.node, process, os.pidfd_open(process.pid), command.log_path, self._loop.create_future(),
            on_line=command.on_line, log_start=log_start,
        )  # fmt: skip
        self.by_node[command.node] = agent
        self._loop.add_reader(agent.pidfd, self._ended, agent)
        if process.stdout is not None:
            os.set_blocking(process.stdout.fileno(), False)
            self._loop.add_reader(process.stdout.fileno(), self._read, agent)
        os.set_blocking(_stdin(agent).fileno(), False)
        self.write(agent, command.first_input)
        return agent

    def write(self, agent: AgentProcess, data: bytes) -> None:
        """Further input, after what was written before. Lost if the process has ended."""
        stdin = _stdin(agent)
        if stdin.closed:
            return
        if not agent.unwritten:
            self._loop.add_writer(stdin.fileno(), self._flush, agent)
        agent.unwritten += data
        self._flush(agent)

    def _flush(self, agent: AgentProcess) -> None:
        stdin = _stdin(agent)
        try:
            del agent.unwritten[: os.write(stdin.fileno(), agent.unwritten)]
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("agent of %s ended before it took its input: %s", agent.node, error)  # its exit is on the way
            agent.unwritten.clear()
        if not agent.unwritten:
            self._loop.remove_writer(stdin.fileno())

    def _read(self, agent: AgentProcess) -> None:
        stdout = agent.process.stdout
        if stdout is None or stdout.closed or agent.on_line is None:
            return
        while True:
            try:
                data = os.read(stdout.fileno(), _READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(stdout.fileno())
                stdout.close()
            agent.unread += data
            *lines, rest = agent.unread.split(b"\n")
            if not data or len(rest) > _LINE_BYTES:
                lines, rest = [*lines, rest], bytearray()
            agent.unread = bytearray(rest)
            for line in filter(None, lines):
                agent.on_line(line.decode(errors="replace"))
            if not data:
                return

    def _ended(self, agent: AgentProcess) -> None:
        self._forget(agent)
        code = agent.process.wait()  # at once: the pidfd was readable
        self._read(agent)  # what it said last
        self._close_stdout(agent)
        self.close_lifeline(agent)
        agent.exited.set_result(code)
        self._on_exit(agent)

    def _forget(self, agent: AgentProcess) -> None:
        self._loop.remove_reader(agent.pidfd)
        os.close(agent.pidfd)

    def _close_stdout(self, agent: AgentProcess) -> None:
        stdout = agent.process.stdout
        if stdout is not None and not stdout.closed:  # something below it may hold the other end open
            self._loop.remove_reader(stdout.fileno())
            stdout.close()

    def running(self, nodes: Iterable[str] | None = None) -> list[AgentProcess]:
        """Those that have not ended: all, or of these nodes."""
        wanted = self.by_node if nodes is None else nodes
        return [self.by_node[node] for node in wanted if node in self.by_node and not self.by_node[node].exited.done()]

    def close_lifeline(self, agent: AgentProcess) -> None:
        """A ``Step``: the end of its stdin."""
        stdin = _stdin(agent)
        if not stdin.closed:
            self._loop.remove_writer(stdin.fileno())
            agent.unwritten.clear()
            stdin.close()

    async def stop(self, steps: Sequence[Step], *, grace_s: float, nodes: Iterable[str] | None = None) -> list[str]:
        """End all, or those of ``nodes``: step by step, with ``grace_s`` after each. Returns the nodes, pids and states
        of those on which the last step had to be used, if there is more than one step."""
        wanted = None if nodes is None else list(nodes)
        forced: list[str] = []
        try:
            for number, step in enumerate(steps):
                running = self.running(wanted)
                if number and number == len(steps) - 1:
                    forced = [f"{agent.node}: pid {agent.pid}, {_state(agent.pid)}" for agent in running]
                for agent in running:
                    step(agent)
                if running:
                    await asyncio.wait([agent.exited for agent in running], timeout=grace_s)
        finally:  # also when cancelled: the ends of lifelines are on their way, only nobody watches any more
            for agent in self.running(wanted):
                self.close_lifeline(agent)
                self._close_stdout(agent)
                self._forget(agent)
                agent.exited.cancel()
        return forced


def terminate(agent: AgentProcess) -> None:
    """A ``Step``: SIGTERM."""
    agent.process.terminate()


def kill(agent: AgentProcess) -> None:
    """A ``Step``: SIGKILL, also for what is below it, as far as it can be seen now."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(agent.pid).children(recursive=True)
    agent.process.kill()
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil compares start times: a reused pid is not hit


def kill_agent(agent: AgentProcess) -> None:
    """A ``Step`` for reapers: it kills its agent without grace; it is woken first, in case somebody stopped it."""
    agent.process.send_signal(signal.SIGCONT)
    agent.process.send_signal(signal.SIGQUIT)


def _private_log(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab", buffering=0)


def _stdin(agent: AgentProcess) -> IO[bytes]:
    if agent.process.stdin is None:
        raise AssertionError("started with stdin=PIPE")
    return agent.process.stdin


def _state(pid: int) -> str:
    try:
        return f"state {psutil.Process(pid).status()}"
    except psutil.NoSuchProcess:
        return "gone by now"
