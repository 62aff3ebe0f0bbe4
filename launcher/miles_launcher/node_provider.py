"""Nodes for an embedded job, from a scheduler that has some: the protocols between the two, and this machine as one.

The job asks (``request``), invites an agent onto each node that it gets (``Node.start``), and gives nodes back. For
each node that ``request`` returned exactly one of ``release`` and ``lost`` is called, when the job has no use for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from miles_launcher.local import LocalAgents, agent_flags


@dataclass(frozen=True)
class Gang:
    """Processes that are placed together: ``count`` of them, each with ``devices`` on one node."""

    name: str
    count: int
    devices: int


@dataclass(frozen=True)
class NodeNeed:
    """What a job needs of all its nodes together.

    Attributes:
        job: Its name.
        kind: GPUs, or slots of CPUs (of which ranks may share one where there are too few).
        devices: In all; colocated gangs are counted once.
        gangs: What they are for.
    """

    job: str
    kind: Literal["gpu", "cpu"]
    devices: int
    gangs: tuple[Gang, ...]


@dataclass(frozen=True)
class Invitation:
    """With what an agent on a node joins the job. ``key`` and ``env`` may be secret: neither is shown by ``repr``.

    Attributes:
        node: The node's name in the job.
        run_id: The job's.
        address: Where the agent dials, ``tcp://host:port``.
        local_address: The same for an agent on the controller's machine.
        key: The key bundle: one line for the agent's stdin, whose end later tells the agent that its starter is gone.
        run_dir: Where the agent writes logs.
        preload: Modules that ranks are forked with.
        env: Variables that the agent has beyond those of its machine.
        report_exit: To be called with what was seen, and the pid of ``miles agent``, when it ended by itself with
            exit code 0: then nothing that it started is left. Saves waiting for the node's lease.
    """

    node: str
    run_id: str
    address: str
    local_address: str
    key: str = field(repr=False)
    run_dir: Path
    preload: tuple[str, ...] | None
    env: Mapping[str, str] = field(repr=False)
    report_exit: Callable[[str, int], None] = field(repr=False)

    def command(self, python: str = sys.executable, *, is_local: bool = False) -> list[str]:
        """The command line of the agent, with that interpreter. It has no secrets."""
        address = self.local_address if is_local else self.address
        flags = ["--controller", address, "--run-dir", str(self.run_dir), *agent_flags(preload=self.preload)]
        return [python, "-m", "miles_launcher.cli", "agent", "--node", self.node, *flags]

    def key_line(self) -> bytes:
        """What is written to the agent's stdin, or into a file for ``--key-file`` (mode 0600)."""
        return self.key.rstrip("\n").encode() + b"\n"


class Node(Protocol):
    """One machine that a scheduler has given."""

    @property
    def name(self) -> str:
        """Unique among the job's nodes: 1 to 64 letters, digits, ``.``, ``_`` and ``-``."""

    async def start(self, invitation: Invitation) -> None:
        """Start an agent there. It need not have joined on return. May be cancelled."""

    async def stop(self) -> None:
        """Make sure that nothing of the job is left there. The agent has been asked to leave before. Idempotent."""


class NodeProvider(Protocol):
    """A scheduler, as a job sees it."""

    async def request(self, need: NodeNeed) -> Sequence[Node]:
        """Nodes that are the job's from now on; waits for as long as it takes. Cancelled, it must have given none."""

    async def release(self, node: Node) -> None:
        """The job is done with this node: nothing of it runs there."""

    async def lost(self, node: Node, why: str) -> None:
        """The controller has lost this node: it is dead, cannot be reached, or its agent has left unasked. ``release``
        is not called for it."""


class LocalNode:
    """This machine, or a part of it, as a node.

    Args:
        cpu_slots: Slots that it offers where there is no GPU; None: a default by its cores.
        gpus: Indices or UUIDs of its GPUs; None: all that this process may use.
    """

    def __init__(
        self, name: str = "node-0", *, cpu_slots: int | None = None, gpus: Sequence[int | str] | None = None
    ) -> None:
        self._name = name
        self._cpu_slots = cpu_slots
        self._gpus = gpus
        self._agents: LocalAgents | None = None

    @property
    def name(self) -> str:
        """As given."""
        return self._name

    async def start(self, invitation: Invitation) -> None:
        """Start its agent. Raises CannotStartAgent."""
        visible = {} if self._gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self._gpus))}
        agents = LocalAgents(
            _Invited(invitation),
            [invitation.node],
            run_dir=invitation.run_dir,
            cpu_slots=self._cpu_slots,
            preload=invitation.preload,
            env={**os.environ, **invitation.env, **visible},
        )
        self._agents = await agents.__aenter__()

    async def stop(self) -> None:
        """End its agent. Raises AgentWouldNotStop."""
        agents, self._agents = self._agents, None
        if agents is not None:
            await agents.__aexit__(None)


class _Invited:
    """What ``LocalAgents`` needs of a controller, from an invitation."""

    def __init__(self, invitation: Invitation) -> None:
        self._invitation = invitation

    @property
    def local_address(self) -> str:
        return self._invitation.local_address

    def issue_key(self, node: str) -> str:
        return self._invitation.key

    def report_node_exit(self, node: str, evidence: str, *, reaper: int) -> None:
        self._invitation.report_exit(evidence, reaper)

    async def dismiss(self, *nodes: str, reason: str) -> None:
        """The job has done that already."""


class FixedNodes:
    """A provider that has these nodes and gives all of them to the job: ``FixedNodes(LocalNode())``."""

    def __init__(self, *nodes: Node) -> None:
        self._nodes = nodes

    async def request(self, need: NodeNeed) -> Sequence[Node]:
        """All, whatever is needed: what does not fit is told by the placement."""
        return self._nodes

    async def release(self, node: Node) -> None:
        """Nobody else wants it."""

    async def lost(self, node: Node, why: str) -> None:
        """Nobody else wants it."""
