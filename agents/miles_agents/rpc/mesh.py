"""Handles: what a caller holds of a mesh of actors, and the verbs.

=============  =======================================  =================================
verb           reaches                                  gives
=============  =======================================  =================================
``call``       every rank                               future of a ValueMesh by coordinate
``call_one``   the one rank of a mesh of one            future of its value (or a stream)
``broadcast``  every rank; no answer                    future, done when all have taken it
``choose``     the rank with the fewest open calls      future of its value
``stream``     every rank                               (point, value) as they come
=============  =======================================  =================================

A call is under way when the verb returns, awaited or not. Arrays and large bytes among the arguments are
not copied: they must not change until the call has ended; what an endpoint returns is copied. Handles travel: pass
them to actors as arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from miles_agents.errors import PeerFault
from miles_agents.rpc.actor import EndpointInfo
from miles_agents.rpc.context import find_actor
from miles_agents.rpc.errors import NotAnActorProcess, NotAnEndpoint, WrongVerb
from miles_agents.rpc.future import CallFuture
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.seconds import checked_seconds
from miles_agents.rpc.shape import Point, Shape, ValueMesh
from miles_agents.rpc.sinks import MeshSink, OneSink, StreamSink, TakenSink
from miles_agents.rpc.streams import CallStream
from miles_agents.store import ref as _ref  # noqa: F401 - references travel in calls, so every process knows them
from miles_agents.wire.codec import register_converter
from miles_agents.wire.envelope import ONE_WAY, STREAM, Target

_tuple = tuple.__new__


@dataclass(slots=True)
class MeshInfo:
    """What is known of a spawned mesh. ``incarnations`` by rank; the controller's own copy is kept current."""

    mesh: int
    name: str
    incarnations: dict[int, int]
    endpoints: dict[str, EndpointInfo] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How a call is made. ``timeout_s``: the deadline, which travels; None inherits that of the running call."""

    timeout_s: float | None = None
    return_exceptions: bool = False


class ActorMesh:
    """A handle of a mesh or of a slice of one. ``mesh.train.call(...)`` calls the endpoint ``train``."""

    def __init__(self, info: MeshInfo, shape: Shape, node: RpcNode | None = None) -> None:
        self._info = info
        self._shape = shape
        self._node = node
        self._options = CallOptions()

    @property
    def name(self) -> str:
        """The name it was spawned under."""
        return self._info.name

    @property
    def shape(self) -> Shape:
        """Named dimensions, and the rank at each position."""
        return self._shape

    @property
    def endpoints(self) -> dict[str, EndpointInfo]:
        """What can be called, by name."""
        return dict(self._info.endpoints)

    def __len__(self) -> int:
        return len(self._shape)

    def __repr__(self) -> str:
        return f"<ActorMesh {self.name} ({self._shape.extent})>"

    def __getattr__(self, name: str) -> Endpoint:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.endpoint(name)

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint of that name.

        Names like ``__close__`` are those of the runtime; every worker has them, no actor declares them.

        Raises:
            NotAnEndpoint: the actor has none of that name.
        """
        known = self._info.endpoints
        info = known.get(name)
        if known and info is None and not name.startswith("__"):
            raise no_such_endpoint(self.name, name, known)
        return Endpoint(self, name, info)

    def slice(self, **selectors: int | slice) -> ActorMesh:
        """A part: an int drops the dimension, a slice keeps it."""
        return self._with(self._shape.slice(**selectors))

    def flatten(self, name: str) -> ActorMesh:
        """The same ranks along one dimension."""
        return self._with(self._shape.flatten(name))

    def options(self, *, timeout_s: float | None = None, return_exceptions: bool | None = None) -> ActorMesh:
        """The same mesh, called with a deadline, or collecting errors in place of failing at the first.

        Raises:
            NotADuration: ``timeout_s`` is not a finite number.
        """
        part = self._with(self._shape)
        changes: dict[str, Any] = {}
        if timeout_s is not None:
            changes["timeout_s"] = checked_seconds("timeout_s", timeout_s)
        if return_exceptions is not None:
            changes["return_exceptions"] = return_exceptions
        part._options = replace(self._options, **changes)
        return part

    def targets(self) -> list[Target]:
        """The receivers of a call, with the incarnations that this handle knows."""
        incarnations = self._info.incarnations
        ranks = self._shape.ranks
        return [_tuple(Target, (rank, incarnations.get(rank, 0), i)) for i, rank in enumerate(ranks)]

    def node(self) -> RpcNode:
        """The way out of this process. Raises NotAnActorProcess where there is none."""
        if self._node is not None:
            return self._node
        actor = find_actor()
        if actor is None:
            raise NotAnActorProcess(
                f"{self!r} was used where no runtime is",
                evidence="a handle that travelled works inside the worker that received it",
                advice="Use it in an endpoint, or in a thread that an actor started.",
            )
        return actor.node

    def to_plain(self) -> dict[str, Any]:
        """The handle as plain values, to travel."""
        info = self._info
        return {
            "mesh": info.mesh,
            "name": info.name,
            "lives": _runs([(rank, info.incarnations.get(rank, 0)) for rank in self._shape.ranks]),
            "shape": self._shape.to_plain(),
            "endpoints": [endpoint_to_plain(e) for e in info.endpoints.values()],
        }

    @classmethod
    def from_plain(cls, plain: Any) -> ActorMesh:
        """Inverse of ``to_plain``. Raises BadHandle."""
        try:
            endpoints = {e.name: e for e in (endpoint_from_plain(p) for p in plain["endpoints"])}
            shape = Shape.from_plain(plain["shape"])
            incarnations = _lives(plain["lives"], len(shape))
            return cls(MeshInfo(int(plain["mesh"]), str(plain["name"]), incarnations, endpoints), shape)
        except (KeyError, TypeError, ValueError) as error:
            raise BadHandle(
                "a handle arrived that is none",
                evidence=f"{type(error).__name__}: {error}",
                advice="Run the same version of this package everywhere.",
            ) from error

    def _with(self, shape: Shape) -> ActorMesh:
        part = ActorMesh(self._info, shape, self._node)
        part._options = self._options
        return part


class BadHandle(PeerFault):
    """A mesh handle that came over the wire makes no sense."""

    code = "E-WIRE-002"


class Endpoint:
    """One endpoint of a mesh, ready to be called. The verbs are those of the module's table."""

    __slots__ = ("_info", "_mesh", "name")

    def __init__(self, mesh: ActorMesh, name: str, info: EndpointInfo | None) -> None:
        self._mesh = mesh
        self._info = info
        self.name = name

    def __repr__(self) -> str:
        return f"<Endpoint {self._label}>"

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: a verb has to be named."""
        raise WrongVerb(
            f"{self._label} was called like a function",
            evidence=f"it lives in {len(self._mesh)} other processes",
            advice=f"Use a verb: {self.name}.call(...), .call_one(...), .broadcast(...), .choose(...) or .stream(...).",
        )

    def call(self, *args: Any, **kwargs: Any) -> CallFuture[ValueMesh[Any]]:
        """Call every rank; fails at the first failure unless ``return_exceptions``."""
        self._refuse_generator("call", "stream")
        node, mesh = self._mesh.node(), self._mesh
        sink = MeshSink(node, self._label, mesh.shape, return_exceptions=mesh._options.return_exceptions)
        self._begin(node, sink, mesh.targets(), (args, kwargs))
        return sink.future

    def call_one(self, *args: Any, **kwargs: Any) -> Any:
        """Call the one rank of a mesh of one: a ``CallFuture``, or a ``CallStream`` for a generator endpoint."""
        mesh = self._mesh
        if len(mesh) != 1:
            raise WrongVerb(
                f"call_one on {self._label}, which has {len(mesh)} ranks",
                evidence=f"{mesh!r}",
                advice="Use call, or slice the mesh down to one rank.",
            )
        if self._info is not None and self._info.is_generator:
            return self._stream(args, kwargs, with_points=False)
        node = mesh.node()
        sink = OneSink(node, self._label)
        self._begin(node, sink, mesh.targets(), (args, kwargs))
        return sink.future

    def broadcast(self, *args: Any, **kwargs: Any) -> CallFuture[None]:
        """Call every rank without an answer; the future is done when all have taken it from their queue."""
        self._refuse_generator("broadcast", "stream")
        node = self._mesh.node()
        sink = TakenSink(node, self._label)
        self._begin(node, sink, self._mesh.targets(), (args, kwargs), ONE_WAY)
        return sink.future

    def choose(self, *args: Any, **kwargs: Any) -> CallFuture[Any]:
        """Call the rank that owes this process the fewest answers."""
        self._refuse_generator("choose", "stream")
        node = self._mesh.node()
        target = node.calls.least_owing(self._mesh._info.mesh, self._mesh.targets())
        sink = OneSink(node, self._label)
        self._begin(node, sink, [target._replace(position=0)], (args, kwargs))
        return sink.future

    def stream(self, *args: Any, **kwargs: Any) -> CallStream[tuple[Point, Any]]:
        """Call every rank; (point, value) pairs as they come, or (point, item) for generator endpoints."""
        return cast("CallStream[tuple[Point, Any]]", self._stream(args, kwargs, with_points=True))

    def _stream(self, args: Any, kwargs: Any, *, with_points: bool) -> CallStream[Any]:
        node, mesh = self._mesh.node(), self._mesh
        is_generator = self._info is None or self._info.is_generator  # it may be, where nothing is known
        points = list(mesh.shape.points()) if with_points else None
        sink = StreamSink(node, points, is_generator=is_generator)
        stream = sink.open(self._label)
        self._begin(node, sink, mesh.targets(), (args, kwargs), STREAM if is_generator else 0)
        return stream

    def _begin(
        self,
        node: RpcNode,
        sink: OneSink | MeshSink | TakenSink | StreamSink,
        targets: list[Target],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        flags: int = 0,
    ) -> None:
        timeout_s = self._mesh._options.timeout_s
        mesh = self._mesh._info.mesh
        lane = "runtime" if self.name.startswith("__") else self._info.thread if self._info is not None else "main"
        sink.rid = node.begin(mesh, targets, self.name, arguments, sink, flags=flags, timeout_s=timeout_s, lane=lane)

    def _refuse_generator(self, verb: str, instead: str) -> None:
        if self._info is not None and self._info.is_generator:
            raise WrongVerb(
                f"{verb} on {self._label}, a generator endpoint",
                evidence="it yields many items, one answer would lose them",
                advice=f"Use {instead}, or call_one on a mesh of one.",
            )

    @property
    def _label(self) -> str:
        return f"{self._mesh.name}.{self.name}"


def no_such_endpoint(actor: str, name: str, known: Iterable[str]) -> NotAnEndpoint:
    """The error for a name that is no endpoint, with the nearest that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return NotAnEndpoint(
        f"{actor} has no endpoint {name!r}",
        evidence=f"its endpoints: {', '.join(names) or 'none'}",
        advice=f"Did you mean {near[0]!r}?" if near else "Mark the method with @endpoint, or call another.",
    )


def endpoint_to_plain(info: EndpointInfo) -> list[Any]:
    """An EndpointInfo as plain values."""
    return [info.name, info.thread, info.is_async, info.is_generator, info.group]


def endpoint_from_plain(plain: Any) -> EndpointInfo:
    """Inverse of ``endpoint_to_plain``."""
    name, thread, is_async, is_generator, group = plain
    return EndpointInfo(str(name), thread, bool(is_async), bool(is_generator), group)


def _runs(lives: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Ranks and incarnations as ``[first rank, first incarnation, how many]``: both count up where ranks were started
    together, and a handle of thousands stays small."""
    runs: list[list[int]] = []
    for rank, incarnation in lives:
        if runs and (rank - runs[-1][0], incarnation - runs[-1][1]) == (runs[-1][2], runs[-1][2]):
            runs[-1][2] += 1
        else:
            runs.append([rank, incarnation, 1])
    return runs


def _lives(runs: list[list[int]], size: int) -> dict[int, int]:
    """Inverse of ``_runs``. Raises ValueError for more or fewer than ``size``."""
    if sum(count for _, _, count in runs) != size or min((count for _, _, count in runs), default=1) < 1:
        raise ValueError("not a life for each rank")
    return {rank + i: incarnation + i for rank, incarnation, count in runs for i in range(count)}


def _point_from_plain(plain: Any) -> Point:
    shape, rank = plain
    return Shape.from_plain(shape).extent.point(int(rank))


def _values_from_plain(plain: Any) -> ValueMesh[Any]:
    shape, values = plain
    return ValueMesh(Shape.from_plain(shape), tuple(values))


register_converter(ActorMesh, "miles.mesh", ActorMesh.to_plain, ActorMesh.from_plain)
register_converter(Shape, "miles.shape", Shape.to_plain, Shape.from_plain)
register_converter(Point, "miles.point", lambda p: [Shape.whole(p.extent).to_plain(), p.rank], _point_from_plain)
register_converter(ValueMesh, "miles.values", lambda v: [v.shape.to_plain(), list(v.values)], _values_from_plain)
