"""How an agent starts workers: the interface, and the real thing on the process table.

The twin for simulations is ``miles_agents.simulation.InProcessStarter``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from miles_agents.agent.process import ProcessTable
from miles_agents.agent.process_child import Child
from miles_agents.agent.process_exit import Exit
from miles_agents.agent.process_kill import KillReport
from miles_agents.agent.process_launch import CannotStart, Command
from miles_agents.agent.zygote_profile import Profile, profile_environment
from miles_agents.agent.zygotes import MissingModule, NoZygote, Zygotes
from miles_agents.errors import EnvironmentFault
from miles_agents.node_info import NodeInfo
from miles_agents.worker.main import STACK_SIGNAL
from miles_agents.worker.spec import SPEC_FD_VARIABLE, Birth, WorkerSpec

logger = logging.getLogger(__name__)
RUN_TAG_VARIABLE = "MILES_RUN"
NODE_PATH_VARIABLE = "MILES_NODE_PATH"
"""Directories of our code and the user's on this node, set by what started the agent where they may differ."""


@dataclass(frozen=True, slots=True)
class Killed:
    """What became of an order to end a worker, for people. ``survivors``: pid and state of what runs all the same."""

    text: str
    survivors: tuple[str, ...] = ()

    @classmethod
    def of(cls, report: KillReport) -> Killed:
        """From what the process table says."""
        return cls(report.describe(), tuple(survivor.describe() for survivor in report.survivors))


class WorkerProcess(Protocol):
    """One started worker."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def exited(self) -> asyncio.Future[Exit]:
        """Resolves when it is gone, however."""

    def state(self) -> str | None:
        """The letter of /proc/pid/stat; None when gone."""

    def print_stacks(self) -> None:
        """Ask for all stacks on its stderr, without the interpreter's help."""

    async def kill(self, grace_s: float) -> Killed:
        """End it with everything below it; confirmed when this returns, in bounded time. May be cancelled."""

    async def sweep(self) -> Killed:
        """After its end: end what it left behind, and wait for its GPU memory; in bounded time."""


class WorkerStarter(Protocol):
    """Starts workers."""

    async def start(self, birth: Birth, log_path: Path) -> WorkerProcess:
        """Start one; returns once it executes. Raises CannotStart."""


class CannotFork(EnvironmentFault):
    """A worker that has to come from a zygote cannot."""

    code = "E-PROC-005"


class ProcessStarter:
    """Real processes, by exec or from a zygote. ``python`` runs the workers; without ``zygotes`` all are executed."""

    def __init__(
        self, table: ProcessTable, info: NodeInfo, python: str = sys.executable, zygotes: Zygotes | None = None
    ) -> None:
        self._table = table
        self._info = info
        self._python = python
        self._zygotes = zygotes
        self._need_path: set[Profile] = set()

    def warm(self, modules: tuple[str, ...]) -> None:
        """Start a zygote for workers that have the agent's own environment."""
        if self._zygotes is not None:
            env = {**os.environ, **worker_defaults(os.environ)}
            self._zygotes.warm(Profile(self._python, Path.cwd(), profile_environment(env), modules))

    async def start(self, birth: Birth, log_path: Path) -> WorkerProcess:
        """See ``WorkerStarter``.

        Raises:
            CannotFork: The spec asks for a zygote, and there is none for it.
        """
        spec = birth.spec
        command = Command(
            argv=(self._python, "-m", "miles_agents.worker"),
            env=worker_environment(os.environ, spec, self._info),
            cwd=_working_directory(spec),
            log_path=log_path,
            numa_node=self._numa_node(spec),
        )
        profile = self._profile(spec, command)
        why = self._why_exec(spec, profile)
        if not why:
            try:
                return _RealWorker(self._table, await self._fork(profile, command, birth))
            except NoZygote as refusal:
                why = str(refusal)
                logger.info("%s is started by exec: %s", spec.label, why)
        if spec.start_method == "zygote":
            raise CannotFork(
                f"{spec.label} cannot be started by a zygote",
                evidence=why,
                advice='Remove what the evidence names, or spawn with start_method="auto".',
            )
        return _RealWorker(self._table, await self._execute(command, birth))

    async def _execute(self, command: Command, birth: Birth) -> Child:
        fd = os.memfd_create("worker", 0)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(birth.pack())
            os.lseek(fd, 0, os.SEEK_SET)
            env = {**command.env, SPEC_FD_VARIABLE: str(fd)}
            return await self._table.spawn(replace(command, env=env, pass_fds=(fd,)))
        finally:
            os.close(fd)

    def _profile(self, spec: WorkerSpec, command: Command) -> Profile:
        profile = Profile(self._python, command.cwd, profile_environment(command.env), spec.preload or ())
        return replace(profile, sys_path=spec.sys_path) if profile in self._need_path else profile

    def _why_exec(self, spec: WorkerSpec, profile: Profile) -> str:
        """Why this worker is not for a zygote; "" if it is."""
        if self._zygotes is None:
            return "this agent has no zygotes"
        if spec.start_method == "exec":
            return "the mesh asks for it"
        if self._info.gpus and spec.devices:
            return "the rank has GPUs, and CUDA does not survive a fork"
        wanted = spec.start_method == "zygote" or spec.preload is not None
        if wanted or spec.siblings > 1 or self._zygotes.lives(profile):
            return ""
        return "it starts alone"

    async def _fork(self, profile: Profile, command: Command, birth: Birth) -> Child:
        assert self._zygotes is not None
        wait_s = birth.spec.start_timeout_s / 2  # the other half is for exec
        try:
            return await self._zygotes.start(profile, command, birth.pack(), wait_s=wait_s)
        except MissingModule as missing:
            self._need_path.add(profile)
            if not birth.spec.sys_path:
                raise NoZygote(f"there is no module {missing}") from None
        profile = replace(profile, sys_path=birth.spec.sys_path)
        try:
            return await self._zygotes.start(profile, command, birth.pack(), wait_s=wait_s)
        except MissingModule as missing:
            raise NoZygote(f"there is no module {missing}") from None

    def _numa_node(self, spec: WorkerSpec) -> int | None:
        if not spec.bind_numa or not spec.devices:
            return None
        return next((gpu.numa_node for gpu in self._info.gpus if gpu.index == spec.devices[0]), None)


def _working_directory(spec: WorkerSpec) -> Path:
    try:
        return Path(spec.cwd or Path.cwd())
    except OSError as error:
        raise CannotStart(
            f"cannot start {spec.label}: the agent's working directory is gone",
            evidence=str(error),
            advice="Start the agent in a directory that stays for as long as the run does.",
        ) from None


class _RealWorker:
    def __init__(self, table: ProcessTable, child: Child) -> None:
        self._table = table
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def exited(self) -> asyncio.Future[Exit]:
        return self._child.exited

    def state(self) -> str | None:
        return self._child.state()

    def print_stacks(self) -> None:
        self._child.send(STACK_SIGNAL)

    async def kill(self, grace_s: float) -> Killed:
        return Killed.of(await self._table.kill_tree(self._child, grace_s=grace_s))

    async def sweep(self) -> Killed:
        return Killed.of(await self._table.kill_tree(self._child, grace_s=0.0))


def worker_defaults(base: Mapping[str, str]) -> dict[str, str]:
    """What all workers have on top of the agent's environment ``base``."""
    return {"OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}


def with_node_path(env: dict[str, str], base: Mapping[str, str]) -> None:
    """Where this node has the code comes before where the controller has it."""
    own = base.get(NODE_PATH_VARIABLE, "")
    if own:
        given = env.get("PYTHONPATH", "")
        env["PYTHONPATH"] = given if given.startswith(own) else os.pathsep.join(filter(None, [own, given]))


def worker_environment(base: Mapping[str, str], spec: WorkerSpec, info: NodeInfo) -> dict[str, str]:
    """The complete environment of a worker: the agent's, then defaults as of torchrun, then the run's own.

    ``CUDA_VISIBLE_DEVICES`` is left alone unless the spec asks for ``"own"``, which becomes the UUIDs of its GPUs.
    """
    env = {**base, **worker_defaults(base)}
    env[RUN_TAG_VARIABLE] = f"{spec.run_id}:{spec.incarnation}"
    env["RANK"] = str(spec.rank)
    env["WORLD_SIZE"] = str(len(spec.shape))
    env["LOCAL_RANK"] = str(spec.local_rank)
    env.update(spec.env)
    with_node_path(env, base)
    if env.get("CUDA_VISIBLE_DEVICES") == "own":
        uuids = {gpu.index: gpu.uuid for gpu in info.gpus}
        env["CUDA_VISIBLE_DEVICES"] = ",".join(uuids.get(index, str(index)) for index in spec.devices)
    return env
