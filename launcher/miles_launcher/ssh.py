"""Agents on other machines, started through the user's own OpenSSH and its configuration.

``SshAgents`` consumes machines and a controller that listens where they reach it. It produces one ``ssh`` for each,
some at a time, which starts the agent (``remote_start``) and holds its stdin for as long as the run lives; errors that
say of each host why it cannot be used (``ssh_errors``). It waits for hosts to join, each with a deadline, and on
leaving for agents to end in good order, then for the ssh processes, each wait bounded.

Invariants: keys travel over stdin, and only to hosts that have passed their checks; either all hosts join or none of
what was started stays; the end of an ssh ends nothing by itself (``host_life``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from miles_agents.errors import MilesError
from miles_launcher import host_life as life
from miles_launcher.agents import AgentCommand, AgentProcess, AgentProcesses, ControllerLike, kill, terminate
from miles_launcher.bounded_start import AT_ONCE, Report, start_all
from miles_launcher.ssh_errors import NotShared, all_failed, from_exit, from_host, not_copied
from miles_launcher.ssh_start import (
    COPY_S,
    Machine,
    OwnCode,
    Run,
    Ssh,
    copies,
    header,
    python_of,
    start_words,
    with_share,
)

logger = logging.getLogger(__name__)
GRACE_S = 10.0
_TAIL_BYTES = 4096


class RemoteController(ControllerLike, Protocol):
    """What is needed of a controller whose agents are elsewhere."""

    run_id: str

    @property
    def address(self) -> str:
        """Where agents of other machines dial: ``tcp://host:port``."""

    async def wait_for_nodes(self, *names: str, timeout_s: float) -> None:
        """Until these have joined. Raises MilesError."""


@dataclass(frozen=True, slots=True)
class SshSettings:
    """How hosts are started.

    Attributes:
        python: Interpreter of hosts that name none; None: the path of this one.
        copies_code: Copy the code to each host.
        modules: What has to be importable there beyond the agent's own needs.
        must_share: Directories that all hosts have to see, by flag.
        env: Of everything that runs there.
        flags: Of ``miles agent``, for all.
        slots: Offered by hosts that name no number of their own; None: all GPUs, or the agent's number of CPU slots.
        on_gpus: Slots are GPUs.
        timeout_s: In which a host has to join, from its turn on.
        grace_s: After each step of ending.
    """

    ssh: Ssh = field(default_factory=Ssh)
    python: str | None = None
    copies_code: bool = False
    modules: tuple[str, ...] = ()
    must_share: Mapping[str, Path] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    slots: int | None = None
    on_gpus: bool = False
    at_once: int = AT_ONCE
    timeout_s: float = 120.0
    grace_s: float = GRACE_S


@dataclass(slots=True)
class _Host:
    """One machine and what is known of it. ``done``: None when it has joined, else why it cannot be used."""

    machine: Machine
    done: asyncio.Future[MilesError | None]
    mark: str = field(default_factory=lambda: f"miles-{secrets.token_hex(8)}")
    life: life.HostLife = field(default_factory=life.HostLife)
    facts: dict[str, Any] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class SshAgents:
    """Async context manager: agents on all machines on entering, none on leaving.

    Raises, on entering: what ``ssh_errors`` has; StartTooSlow; NotShared. ``report``: how long each took.
    """

    def __init__(
        self, controller: RemoteController, machines: Sequence[Machine], run_dir: Path, settings: SshSettings
    ) -> None:
        self._controller = controller
        self._machines = {machine.name: machine for machine in machines}
        self._run_dir = run_dir
        self._settings = settings
        self._hosts: dict[str, _Host] = {}
        self._processes: AgentProcesses | None = None
        self._run: Run | None = None
        self.report = Report()

    @property
    def agents(self) -> Mapping[str, AgentProcess]:
        """The ssh of each host, by node."""
        return {} if self._processes is None else self._processes.by_node

    def phase(self, node: str) -> life.Phase:
        """Where a host is in its life."""
        return self._hosts[node].life.phase

    def facts(self, node: str) -> Mapping[str, Any]:
        """What a host said when it was ready: ``hostname``, ``reaper``, ``logs``, ``shared``."""
        return self._hosts[node].facts

    # -- beginning and end -----------------------------------------------------------------------------------

    async def __aenter__(self) -> SshAgents:
        loop = asyncio.get_running_loop()
        self._processes = AgentProcesses(self._on_exit)
        self._hosts = {name: _Host(machine, loop.create_future()) for name, machine in self._machines.items()}
        code = await asyncio.to_thread(OwnCode.read)
        try:
            with _tokens(self._shown_directories(), self._controller.run_id) as shared:
                self._run = self._described(code, shared)
                settings = self._settings
                self.report = await start_all(
                    list(self._hosts), self, at_once=settings.at_once, timeout_s=settings.timeout_s
                )
            if self.report.failed:
                raise all_failed(self.report.failed, len(self._hosts))
            self._check_shared()
        except BaseException:
            await self._stop("its start failed")
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._stop("its starter is done" if kind is None else f"its starter failed: {kind.__name__}")

    def _described(self, code: OwnCode, shared: Mapping[str, str]) -> Run:
        settings = self._settings
        return Run(
            run_id=self._controller.run_id,
            run_dir=self._run_dir,
            code=code,
            copies_code=settings.copies_code,
            modules=settings.modules,
            shared=shared,
            flags=("--controller", self._controller.address, *settings.flags),
            env=settings.env,
        )

    def _shown_directories(self) -> list[Path]:
        return list(dict.fromkeys([self._run_dir, *self._settings.must_share.values()]))

    def _check_shared(self) -> None:
        lacking = [
            f"{flag} {path}: another directory on {', '.join(hosts)}"
            for flag, path in self._settings.must_share.items()
            if (hosts := [name for name, host in self._hosts.items() if str(path) not in host.facts.get("shared", ())])
        ]
        if lacking:
            raise NotShared(
                "not all hosts see the same directories",
                evidence="\n".join(lacking),
                advice="Name directories on a filesystem that all hosts and this machine share.",
            )
        for name, host in self._hosts.items():
            if str(self._run_dir) not in host.facts.get("shared", ()):
                logs = host.facts.get("logs")
                logger.warning("logs of %s stay there, in %s: the run directory is not shared", name, logs)

    async def _stop(self, reason: str) -> None:
        """Goodbye to agents; then the end of stdin, SIGTERM, SIGKILL for ssh. Hosts that did not leave are told."""
        processes = self._processes
        if processes is None:
            return
        try:
            left = await self._controller.dismiss(*self._hosts, reason=reason)
            if isinstance(left, list) and left:
                logger.warning("%s did not say goodbye; the agents there end everything by themselves", ", ".join(left))
        finally:
            for host in self._hosts.values():
                for task in host.tasks:
                    task.cancel()
            await asyncio.gather(*(t for host in self._hosts.values() for t in host.tasks), return_exceptions=True)
            steps = (_wait, processes.close_lifeline, terminate, kill)
            await processes.stop(steps, grace_s=self._settings.grace_s)
            for host in self._hosts.values():
                self._apply(host, life.GivenUp())

    # -- Starter ---------------------------------------------------------------------------------------------

    async def start(self, node: str) -> None:
        """See ``bounded_start.Starter``."""
        host = self._hosts[node]
        self._apply(host, life.StartAsked())
        error = await asyncio.shield(host.done)
        if error is not None:
            raise error

    async def give_up(self, node: str) -> None:
        """See ``bounded_start.Starter``."""
        host = self._hosts[node]
        self._apply(host, life.GivenUp())
        for task in host.tasks:
            task.cancel()
        if self._processes is not None:
            steps = (self._processes.close_lifeline, terminate, kill)
            await self._processes.stop(steps, grace_s=self._settings.grace_s / 5, nodes=[node])
        await self._controller.dismiss(node, reason="its start was given up")

    def doing(self, node: str) -> str:
        """See ``bounded_start.Starter``."""
        host = self._hosts[node]
        agent = self.agents.get(node)
        tail = "" if agent is None else f"; {agent.log_path} ends:\n{agent.log_tail()}"
        return host.life.phase.value + tail

    # -- events ----------------------------------------------------------------------------------------------

    def _apply(self, host: _Host, event: life.Event) -> None:
        doing = host.life.phase.value
        host.life, effects = life.step(host.life, event)
        for effect in effects:
            self._carry_out(host, effect, doing)

    def _carry_out(self, host: _Host, effect: life.Effect, doing: str) -> None:
        name = host.machine.name
        match effect:
            case life.Spawn():
                self._spawn(host)
            case life.CopyCode(directory):
                self._task(host, self._copy(host, directory))
            case life.SayGo():
                self._write(host, b"go\n")
            case life.SendKey():
                self._write(host, self._controller.issue_key(name).rstrip("\n").encode() + b"\n")
                self._task(host, self._watch_join(host))
            case life.TellJoined():
                host.done.set_result(None)
            case life.Failed(cause):
                host.done.set_result(self._why(host, cause, doing))
            case life.ReportClean(reaper):
                story = f"the reaper on {name} (pid {reaper}) says that nothing is left"
                self._controller.report_node_exit(name, story, reaper=reaper)
            case life.TellLinkLost():
                agent = self.agents[name]
                logger.warning(
                    "ssh to %s %s; its agent goes on as long as it reaches the controller: %s",
                    name, agent.ending(), agent.log_tail(),
                )  # fmt: skip

    def _why(self, host: _Host, cause: life.Cause, doing: str) -> MilesError:
        shown = host.machine.host
        if cause == "host":
            return from_host(shown, host.facts, {} if self._run is None else self._run.code.files)
        if cause == "copy":
            return not_copied(shown, str(host.facts.get("copying")))
        agent = self.agents.get(host.machine.name)
        if cause == "ssh" and agent is not None:
            python = python_of(host.machine, self._settings.python)
            return from_exit(shown, agent.exited.result(), agent.log_tail(), python=python)
        return from_exit(shown, 0, f"given up while {doing}", python="")

    def _spawn(self, host: _Host) -> None:
        if self._processes is None or self._run is None:
            raise AssertionError("entered")
        machine, settings = host.machine, self._settings
        slots = machine.slots or settings.slots
        flags = ["--cpu-slots", str(slots)] if slots is not None and not settings.on_gpus else []
        if settings.on_gpus:
            machine = with_share(machine, settings.slots)
        command = AgentCommand(
            node=machine.name,
            argv=settings.ssh.command(machine, start_words(python_of(machine, settings.python))),
            first_input=header(self._run, machine, host.mark, flags),
            env=os.environ,
            log_path=self._run_dir / "logs" / f"ssh-{machine.name}.log",
            on_line=lambda line: self._on_line(host, line),
        )
        try:
            self._processes.start(command)
        except MilesError as error:
            host.life = life.HostLife(life.Phase.FAILED)
            host.done.set_result(error)

    def _on_line(self, host: _Host, line: str) -> None:
        mark, _, rest = line.partition(" ")
        if mark != host.mark:
            logger.info("%s on stdout: %s", host.machine.name, line)
            return
        try:
            said = json.loads(rest)
        except ValueError:
            logger.warning("%s said something that cannot be read: %.200s", host.machine.name, rest)
            return
        if said["kind"] in ("ready", "failed"):
            host.facts = said
        match said["kind"]:
            case "wants_code":
                self._apply(host, life.WantsCode(str(said["directory"])))
            case "ready":
                self._apply(host, life.SaidReady(int(said["reaper"])))
            case "failed":
                self._apply(host, life.SaidFailed())
            case "clean":
                self._apply(host, life.SaidClean())

    def _on_exit(self, agent: AgentProcess) -> None:
        self._apply(self._hosts[agent.node], life.SshEnded())

    def _write(self, host: _Host, data: bytes) -> None:
        if self._processes is not None:
            self._processes.write(self._processes.by_node[host.machine.name], data)

    def _task(self, host: _Host, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"start of {host.machine.name}")
        host.tasks.add(task)
        task.add_done_callback(host.tasks.discard)

    async def _watch_join(self, host: _Host) -> None:
        with contextlib.suppress(MilesError):  # whoever waits for the host has a deadline, too
            await self._controller.wait_for_nodes(host.machine.name, timeout_s=self._settings.timeout_s)
            self._apply(host, life.NodeJoined())

    async def _copy(self, host: _Host, directory: str) -> None:
        if self._run is None:
            raise AssertionError("entered")
        for command in copies(self._run, directory, self._settings.ssh, host.machine):
            error = await run_copy(command)
            if error:
                host.facts = {"copying": error}
                self._apply(host, life.CodeCopied(well=False))
                return
        self._apply(host, life.CodeCopied())


async def run_copy(command: Sequence[str]) -> str:
    """Run rsync to its end; returns why it failed, or "". Killed when cancelled, or after ``COPY_S``."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"{command[0]} cannot be run here: {error}"
    try:
        async with asyncio.timeout(COPY_S):
            _, stderr = await process.communicate()
    except TimeoutError:
        return f"{command[0]} did not end within {COPY_S:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    tail = stderr[-_TAIL_BYTES:].decode(errors="replace").strip()
    return f"{command[0]} exited with code {process.returncode}: {tail}" if process.returncode else ""


@contextmanager
def _tokens(directories: Sequence[Path], run_id: str) -> Iterator[dict[str, str]]:
    """A file in each of these, by which hosts know whether they see the same one; gone on leaving."""
    shared: dict[str, str] = {}
    written: list[Path] = []
    try:
        for directory in directories:
            token = secrets.token_hex(16)
            file = directory / f".miles-shared-{run_id}"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                file.write_text(token)
            except OSError as error:
                logger.warning("whether hosts see %s cannot be told: %s", directory, error)
                continue
            written.append(file)
            shared[str(directory)] = token
        yield shared
    finally:
        for file in written:
            with contextlib.suppress(OSError):
                file.unlink()


def _wait(_agent: AgentProcess) -> None:
    """A ``Step``: agents that were dismissed end by themselves, and with them ssh."""
