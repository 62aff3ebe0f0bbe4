"""What an embedded job says of itself: frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from miles_agents.errors import MilesError
from miles_controller import Controller

State: TypeAlias = Literal["new", "nodes", "starting", "running", "ending", "finished", "failed", "cancelled"]
"""``nodes``: it waits for its provider, and for agents to join. ``ending``: nothing new begins; processes end."""


@dataclass(frozen=True)
class NodeStatus:
    """A node: ``state`` is ``expected``, ``alive``, ``suspect``, ``dead`` or ``gone``; ``devices``: how many."""

    name: str
    state: str
    hostname: str
    devices: int


@dataclass(frozen=True)
class RankStatus:
    """A process of a mesh (``trainer``, ``rollout``)."""

    mesh: str
    rank: int
    node: str
    pid: int
    state: str
    evidence: str


@dataclass(frozen=True)
class ServiceStatus:
    """An engine, or the router. ``fault``: why it is not ready."""

    name: str
    node: str
    phase: str
    pid: int | None
    fault: str


@dataclass(frozen=True)
class JobStatus:
    """A job at one moment.

    Attributes:
        phase, phase_s: What it does, and for how long; empty: between phases.
        rollouts_done, num_rollout: Iterations behind it, and in all (0: not known yet).
        finished, target, tokens: Of the phase: samples.
        metrics: Of the last iteration.
        error: What ended it, if it failed or was cancelled.
    """

    name: str
    state: State
    run_id: str
    run_dir: Path
    phase: str
    phase_s: float
    rollouts_done: int
    num_rollout: int
    finished: int
    target: int
    tokens: int
    metrics: Mapping[str, float]
    nodes: tuple[NodeStatus, ...]
    ranks: tuple[RankStatus, ...]
    services: tuple[ServiceStatus, ...]
    error: MilesError | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        error = None if self.error is None else {"code": self.error.code, "text": str(self.error)}
        return {**asdict(self), "run_dir": str(self.run_dir), "error": error}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, or an export of the model."""

    rollout_id: int
    path: Path


@dataclass(frozen=True)
class Artefacts:
    """Where a job's files are. What it has not written (yet) is not there.

    Attributes:
        metrics: ``metrics.jsonl`` (docs/metrics.md).
        events: What the controller saw, JSON lines.
        trace: For Perfetto.
        checkpoints, hf_exports: What this job has completed, oldest first; their retention is the user's.
    """

    run_dir: Path
    config: Path
    metrics: Path
    events: Path
    trace: Path
    logs: Path
    checkpoints: tuple[Checkpoint, ...]
    hf_exports: tuple[Checkpoint, ...]


@dataclass(frozen=True)
class JobResult:
    """What a job that has finished has come to: evaluations by metric name, before and after, and a few answers."""

    num_iterations: int
    first_eval: Mapping[str, float]
    last_eval: Mapping[str, float]
    examples: tuple[Mapping[str, Any], ...]
    artefacts: Artefacts


def cluster_status(
    controller: Controller | None,
) -> tuple[tuple[NodeStatus, ...], tuple[RankStatus, ...], tuple[ServiceStatus, ...]]:
    """Nodes, ranks and services as the controller sees them now."""
    if controller is None:
        return (), (), ()
    nodes = []
    for name, member in controller.fabric.membership.members.items():
        info = member.info
        nodes.append(
            NodeStatus(name, member.state, info.hostname if info else "", len(info.devices) if info is not None else 0)
        )
    ranks = [
        RankStatus(mesh.name, rank.rank, rank.slot.node, rank.pid, rank.state, rank.evidence)
        for mesh in controller.meshes.living
        for rank in mesh.ranks
    ]
    services = [
        ServiceStatus(one["name"], one["node"], one["phase"], one["pid"], one["fault"])
        for one in controller.services.snapshot()
    ]
    return tuple(nodes), tuple(ranks), tuple(services)
