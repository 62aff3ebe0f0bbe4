"""``--launcher slurm``: an agent on each node of the allocation, each by an ``srun`` of its own.

One ``srun`` per node and not one for all: srun hands one stdin to all tasks of a step, and each node has a key of its
own, which must be on no command line and in no file; a step of its own ends by itself and with an exit code of its own,
so that a node that fails ends nothing on the others; and what started it is the lifeline of each agent. The steps share
their node's devices with whatever else the job runs there (``--overlap``).

``SlurmAgents`` consumes a controller that listens and commands; it produces agents that have joined, or one error that
names every node that has not and why. It waits for joins, bounded, and on leaving for the ends of all steps, bounded.
Invariants: a node is reported clean only after its reaper's word; after ``__aexit__`` no srun is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from miles.flags.slurm_facts import SlurmFacts, slurm_facts
from miles.training.job import Nodes
from miles.training.parts import preload
from miles_agents.errors import ConfigError, EnvironmentFault, MilesError
from miles_controller import Controller
from miles_launcher.agents import AgentCommand, AgentProcess, AgentProcesses, kill, terminate
from miles_launcher.bounded_start import start_all
from miles_launcher.local import agent_flags
from miles_launcher.own_address import bind_address

logger = logging.getLogger(__name__)

AT_ONCE = 32
"""Steps that are being created at the same time: the controller of Slurm serves them one by one."""
_GRACE_S = 15.0
_OWN_WORDS = "MILES_REAPER_SAYS"


class NoAllocation(ConfigError):
    """``--launcher slurm`` outside of an allocation, or where ``srun`` is not installed."""

    code = "E-SLURM-001"


class StepEnded(EnvironmentFault):
    """The ``srun`` of a node ended before its agent had joined."""

    code = "E-SLURM-002"


class NodesNotStarted(EnvironmentFault):
    """Not all nodes of the allocation could be used."""

    code = "E-SLURM-003"


class StepsWouldNotEnd(EnvironmentFault):
    """Steps had to be left to Slurm: their ``srun`` did not end."""

    code = "E-SLURM-004"


def nodes_by_slurm(config: Mapping[str, Any], env: Mapping[str, str]) -> Nodes:
    """The nodes of the allocation that this process stands in; ``env``: of everything that runs there, over what this
    process has. Raises NoAllocation, NoCommonAddress."""
    allocation = found_allocation(os.environ)
    names = [str(machine["name"]) for machine in config["machines"]]
    on_cpu = config["device"] == "cpu"
    flags = agent_flags(
        cpu_slots=config["cpu_slots"] or None if on_cpu else None,
        preload=preload(config),
        interface=config["interface"],
    )

    def start(controller: Controller, run_dir: Path) -> AbstractAsyncContextManager[Any]:
        return SlurmAgents(
            controller,
            names,
            lambda node: agent_command(
                controller, allocation, node, run_dir=run_dir, flags=flags, env={**os.environ, **env}
            ),
            timeout_s=config["start_timeout"],
        )

    bind = bind_address(config["controller_host"], names)
    return Nodes(tuple(names), start, bind=bind, join_s=config["start_timeout"])


def agent_command(
    controller: Controller,
    allocation: SlurmFacts,
    node: str,
    *,
    run_dir: Path,
    flags: Sequence[str],
    env: Mapping[str, str],
) -> AgentCommand:
    """The srun of one node with what it starts; the key is its first input."""
    key = controller.issue_key(node).rstrip("\n").encode() + b"\n"
    agent = (sys.executable, "-m", "miles_launcher.cli", "agent", "--controller", controller.address, "--node", node)
    argv = (*srun(allocation, node), *agent, "--run-dir", str(run_dir), *flags)
    return AgentCommand(node, argv, key, env, run_dir / "logs" / f"agent-{node}.log")


def found_allocation(environ: Mapping[str, str]) -> SlurmFacts:
    """The allocation of this environment. Raises NoAllocation."""
    allocation = slurm_facts(environ)
    if not allocation.nodes or shutil.which("srun", path=environ.get("PATH")) is None:
        raise NoAllocation(
            "there is no Slurm allocation to run in",
            evidence=allocation.error
            or ("SLURM_JOB_ID and SLURM_JOB_NODELIST are not set" if not allocation.nodes else "no srun on the PATH"),
            advice="Start it with `miles submit`, from a job script, or in a shell of salloc.",
        )
    return allocation


def srun(allocation: SlurmFacts, node: str) -> tuple[str, ...]:
    """The command before the command: one task on that node, with all that the job has there."""
    cpus = allocation.cpus_of(node)
    return (
        "srun",
        f"--jobid={allocation.job}",
        f"--nodelist={node}",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        "--mem=0",  # all that the job has there
        "--overlap",
        "--kill-on-bad-exit=0",
        "--mpi=none",
        "--export=ALL",
        "--unbuffered",
        "--job-name=miles-agent",
    )


class SlurmAgents:
    """See the module.

    Args:
        command: What is started for a node. Its key is the first input.
        timeout_s: For each node, from its turn on, until it has joined.
        grace_s: Wait after each step of stopping: the end of the lifeline, SIGTERM, SIGKILL of srun.
    """

    def __init__(
        self,
        controller: Controller,
        names: Sequence[str],
        command: Callable[[str], AgentCommand],
        *,
        timeout_s: float = 120.0,
        grace_s: float = _GRACE_S,
    ) -> None:
        self._controller = controller
        self._names = list(names)
        self._command = command
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._word = f"miles-reaper-of-{controller.run_id}: clean"
        self._clean: set[str] = set()
        self._joined: set[str] = set()
        self._stopping = False
        self._processes: AgentProcesses | None = None

    @property
    def steps(self) -> Mapping[str, AgentProcess]:
        """The ``srun`` of each node, also those that have ended."""
        return {} if self._processes is None else self._processes.by_node

    async def __aenter__(self) -> SlurmAgents:
        self._processes = AgentProcesses(self._on_exit)
        try:
            report = await start_all(self._names, self, at_once=AT_ONCE, timeout_s=self._timeout_s)
            if report.failed:
                raise _not_started(report.failed, len(self._names))
        except BaseException:
            await self._leave("its starter failed")
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._leave("its starter is done" if kind is None else f"its starter failed: {kind.__name__}")

    # -- a Starter -------------------------------------------------------------------------------------------

    async def start(self, node: str) -> None:
        """Until it has joined. Raises StepEnded, CannotStartAgent."""
        if self._processes is None:
            raise AssertionError("entered")
        command = self._command(node)
        step = self._processes.start(
            AgentCommand(
                node, command.argv, command.first_input, {**command.env, _OWN_WORDS: self._word}, command.log_path,
                on_line=lambda line: self._heard(node, line),
            )
        )  # fmt: skip
        joining = asyncio.create_task(self._controller.wait_for_nodes(node, timeout_s=2 * self._timeout_s))
        ends: list[asyncio.Future[Any]] = [joining, step.exited]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                raise _ended(step)
            await joining
            self._joined.add(node)
        finally:
            joining.cancel()
            await asyncio.wait([joining])

    async def give_up(self, node: str) -> None:
        """End its step."""
        if self._processes is not None:
            await self._processes.stop((terminate, kill), grace_s=self._grace_s, nodes=[node])

    def doing(self, node: str) -> str:
        """What is waited for, and what srun has said."""
        step = self.steps.get(node)
        return "its turn" if step is None else f"srun (pid {step.pid}); it wrote: {step.log_tail()}"

    # -- ends ------------------------------------------------------------------------------------------------

    def _heard(self, node: str, line: str) -> None:
        if line.strip() == self._word:
            self._clean.add(node)
            self._controller.report_node_exit(node, f"the reaper of {node} said that nothing of its agent is left")
        elif line.strip():
            logger.info("%s: %s", node, line)

    def _on_exit(self, step: AgentProcess) -> None:
        story = f"srun of {step.node} (pid {step.pid}) {step.ending()}; log {step.log_path} ends:\n{step.log_tail()}"
        if step.node in self._joined and step.node not in self._clean and not self._stopping:
            # It may only have been cut off. The agent's lease says when the node is over.
            logger.warning("srun of %s has ended, and nothing says that the node is clean: %s", step.node, story)
        else:
            logger.info("%s", story)

    async def _leave(self, reason: str) -> None:
        processes = self._processes
        if processes is None:
            return
        self._stopping = True
        forced: list[str] = []
        try:
            await self._controller.dismiss(*self._names, reason=reason)
        finally:
            steps = (_wait, processes.close_lifeline, terminate, kill)
            forced = await processes.stop(steps, grace_s=self._grace_s)
        if forced:
            raise StepsWouldNotEnd(
                "steps of this job did not end and their srun had to be killed",
                evidence="\n".join(forced),
                advice="Look with `squeue --steps`; Slurm ends them with the job, scancel ends it now.",
            )


def _wait(_step: AgentProcess) -> None:
    """A ``Step``: agents that were dismissed end by themselves, and with them their srun."""


def _ended(step: AgentProcess) -> StepEnded:
    return StepEnded(
        f"srun of {step.node} {step.ending()} before its agent had joined",
        evidence=step.log_tail(),
        advice=f"Do what the evidence says, or try by hand: srun --overlap --nodelist={step.node} -N1 -n1 hostname",
    )


def _not_started(failed: Mapping[str, MilesError], size: int) -> MilesError:
    if len(failed) == 1:
        return next(iter(failed.values()))
    lines = [f"{node}: {error.what}\n  {error.evidence}\n  -> {error.advice}" for node, error in failed.items()]
    return NodesNotStarted(
        f"{len(failed)} of {size} nodes cannot be used",
        evidence="\n".join(lines),
        advice="Do what stands behind each, or leave the nodes out (sbatch --exclude).",
    )
