"""What a worker is told at its birth, over an inherited descriptor: never in arguments or the environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

from miles_agents.errors import ConfigError, InternalError
from miles_agents.rpc.shape import Shape
from miles_agents.timings import Timings

SPEC_FD_VARIABLE = "MILES_WORKER_FD"
START_METHODS = ("auto", "exec", "zygote")


class BadStart(ConfigError):
    """How the processes of a mesh are to be started makes no sense."""

    code = "E-MESH-004"


def check_start(preload: Sequence[str] | None, start_method: str) -> tuple[str, ...] | None:
    """``preload`` as a sorted tuple without repeats. Raises BadStart."""
    if start_method not in START_METHODS:
        raise BadStart(
            f"start_method={start_method!r} is unknown",
            evidence=f"there are: {', '.join(START_METHODS)}",
            advice="Leave it out, or choose one of these.",
        )
    if preload is None:
        return None
    names = [preload] if isinstance(preload, str) else list(preload)
    bad = [name for name in names if not (isinstance(name, str) and all(map(str.isidentifier, name.split("."))))]
    if bad or isinstance(preload, str):
        raise BadStart(
            f"preload={preload!r} is no sequence of module names",
            evidence=f"no module can be called {bad[0]!r}" if bad else "it is one string",
            advice='Give a tuple of importable names: preload=("torch",).',
        )
    return tuple(sorted(set(names)))


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One life of one rank, as the controller decided it.

    Attributes:
        env: Added to the agent's own, and wins.
        preload: Modules to have imported before the actor's class; None: none, and the agent chooses how to start.
        start_method: One of ``START_METHODS``: by exec, by a zygote or not at all, or as the agent sees fit.
        siblings: How many workers of this profile start on this node together, this one included.
        stopped_timeout_s: One whose process is stopped (SIGSTOP) for so long is killed; None: it is only reported.
    """

    run_id: str
    mesh: int
    mesh_name: str
    rank: int
    incarnation: int
    controller_incarnation: int
    shape: Shape
    devices: tuple[int, ...] = ()
    local_rank: int = 0
    env: dict[str, str] = field(default_factory=dict)
    sys_path: tuple[str, ...] = ()
    cwd: str | None = None
    start_timeout_s: float = 120.0
    term_grace_s: float = 5.0
    bind_numa: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    preload: tuple[str, ...] | None = None
    start_method: str = "auto"
    siblings: int = 1
    stopped_timeout_s: float | None = None

    @property
    def label(self) -> str:
        """What people call it: ``trainer[3]``."""
        return f"{self.mesh_name}[{self.rank}]"

    def to_plain(self) -> dict[str, Any]:
        """Plain values."""
        return {name: _plain_value(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> WorkerSpec:
        """Inverse of ``to_plain``."""
        fields = dict(plain)
        if not isinstance(fields["shape"], Shape):  # one for all, see ``unpack_specs``
            fields["shape"] = Shape.from_plain(fields["shape"])
        fields["devices"] = tuple(fields["devices"])
        fields["sys_path"] = tuple(fields["sys_path"])
        fields["preload"] = None if fields["preload"] is None else tuple(fields["preload"])
        return cls(**fields)


def pack_specs(specs: Sequence[WorkerSpec]) -> dict[str, Any]:
    """Specs of one mesh (at least one) as plain values: what all have alike stands there once."""
    first = specs[0]
    varied = [
        name
        for name in WorkerSpec.__dataclass_fields__
        if any(getattr(spec, name) != getattr(first, name) for spec in specs)
    ]
    plain = first.to_plain()
    common = {name: value for name, value in plain.items() if name not in varied}
    each = [{name: _plain_value(getattr(spec, name)) for name in varied} for spec in specs]
    return {"common": common, "each": each}


def unpack_specs(plain: dict[str, Any]) -> list[WorkerSpec]:
    """Inverse of ``pack_specs``."""
    common = plain["common"]
    if "shape" in common:
        common = {**common, "shape": Shape.from_plain(common["shape"])}
    return [WorkerSpec.from_plain({**common, **own}) for own in plain["each"]]


def _plain_value(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.to_plain()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class Birth:
    """A worker's spec and how it reaches its agent. ``token`` proves to the agent who it is.

    ``agent``: the agent's own rank among the agents, and its incarnation. ``store``: the socket of the node's store.
    """

    spec: WorkerSpec
    agent_address: str
    agent: tuple[int, int]
    token: str
    node: str
    timings: Timings
    store: str = ""

    def pack(self) -> bytes:
        """Bytes for the inherited descriptor."""
        plain = {
            "spec": self.spec.to_plain(),
            "agent_address": self.agent_address,
            "agent": list(self.agent),
            "token": self.token,
            "node": self.node,
            "timings": asdict(self.timings),
            "store": self.store,
        }
        packed: bytes = msgpack.packb(plain)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Birth:
        """Inverse of ``pack``. Raises InternalError if the agent wrote something else."""
        try:
            plain = msgpack.unpackb(data)
            spec = WorkerSpec.from_plain(plain["spec"])
            timings = Timings(**plain["timings"])
            rank, incarnation = plain["agent"]
            agent = (rank, incarnation)
            return cls(spec, plain["agent_address"], agent, plain["token"], plain["node"], timings, plain["store"])
        except (KeyError, TypeError, ValueError) as error:
            raise InternalError(
                "the worker cannot read what its agent told it",
                evidence=f"{type(error).__name__}: {error}",
                advice="Report it; agent and worker are of one version by construction.",
            ) from error
