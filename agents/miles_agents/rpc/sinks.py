"""Where the answers of a call go: a future, a mesh of values, or a stream."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Generic, TypeVar

from miles_agents.rpc.future import CallFuture
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Point, Shape, ValueMesh
from miles_agents.rpc.streams import STREAM_CREDITS, CallStream

T = TypeVar("T")
_CREDIT_EVERY = STREAM_CREDITS // 2


class _FutureSink(Generic[T]):
    fail_fast = True

    def __init__(self, node: RpcNode, label: str) -> None:
        self.rid = 0
        self._node = node
        self.label = label
        self.future: CallFuture[T] = CallFuture(label, self._cancel, node.thread)

    def on_item(self, position: int, item: Any) -> None:
        """Generators do not answer futures; the verbs refuse that."""

    def on_end(self, position: int) -> None:
        """See ``on_item``."""

    def on_settled(self) -> None:
        """The future is resolved by then, or nobody waits for it."""

    def on_error(self, position: int, error: BaseException) -> None:
        """Fail at the first failure."""
        self.future.set_exception(error)

    def _cancel(self, wait: bool) -> None:
        self._node.cancel(self.rid, wait=wait)


class OneSink(_FutureSink[Any]):
    """One receiver, one value."""

    def on_value(self, position: int, value: Any) -> None:
        """The answer."""
        self.future.set_result(value)


class TakenSink(_FutureSink[None]):
    """Many receivers; done when all have taken the message."""

    def on_value(self, position: int, value: Any) -> None:
        """One has taken it."""

    def on_settled(self) -> None:
        """All have, or it failed."""
        self.future.set_result(None)


class MeshSink(_FutureSink["ValueMesh[Any]"]):
    """Many receivers, a value each."""

    def __init__(self, node: RpcNode, label: str, shape: Shape, *, return_exceptions: bool) -> None:
        super().__init__(node, label)
        self.fail_fast = not return_exceptions
        self._shape = shape
        self._values: list[Any] = [None] * len(shape)
        self._answered = 0

    def on_value(self, position: int, value: Any) -> None:
        """One answered."""
        self._values[position] = value
        self._answered += 1

    def on_error(self, position: int, error: BaseException) -> None:
        """One failed."""
        if not self.fail_fast:
            self.on_value(position, error)
            return
        point = self._shape.extent.point(position)
        error.add_note(f"at {point!r} of {self.label}; {self._answered} of {len(self._shape)} ranks had answered")
        self.future.set_exception(error)

    def on_settled(self) -> None:
        """All answered, or the future has its error."""
        if not self.future.done():
            self.future.set_result(ValueMesh(self._shape, tuple(self._values)))


class StreamSink:
    """Answers or items as they come. ``points``: pair each with its point; None for a single receiver.

    It does not keep its stream alive: a stream that its consumer dropped (a plain ``break``) is closed.
    """

    fail_fast = True

    def __init__(self, node: RpcNode, points: list[Point] | None, *, is_generator: bool) -> None:
        self.rid = 0
        self._node = node
        self._points = points
        self._stream: weakref.ref[CallStream[Any]] | None = None
        self._is_generator = is_generator
        self._taken: dict[int, int] = {}

    def open(self, label: str) -> CallStream[Any]:
        """The stream, for its consumer to keep."""
        stream: CallStream[Any] = CallStream(label, self._cancel, self._consumed, self._node.thread)
        self._stream = weakref.ref(stream, self._dropped)
        return stream

    def on_value(self, position: int, value: Any) -> None:
        """One receiver answered."""
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.put(position, value if self._points is None else (self._points[position], value))

    def on_item(self, position: int, item: Any) -> None:
        """One receiver yielded."""
        self.on_value(position, item)

    def on_end(self, position: int) -> None:
        """One receiver finished."""

    def on_error(self, position: int, error: BaseException) -> None:
        """One receiver failed: the stream ends with its error, after what came before."""
        self._finish(error)

    def on_settled(self) -> None:
        """Nothing more will come."""
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.finish(error)

    def _dropped(self, _stream: object) -> None:
        # This may run anywhere, in the middle of anything: the loop does the rest in its own time.
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._node.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._node.cancel(self.rid, wait=False)

    def _consumed(self, position: int) -> None:
        if not self._is_generator:
            return
        taken = self._taken.get(position, 0) + 1
        if taken < _CREDIT_EVERY:
            self._taken[position] = taken
            return
        self._taken[position] = 0
        self._node.grant(self.rid, position, taken)
