"""Weight updates by stream: one request tells each engine where to connect to, then buckets follow. Needs torch.

The ends of the lines are ``lines.Lines`` here and ``sglang_utils.receive_weights`` there; ``stream`` describes what
they say. Who sends to whom: on GPUs that are shared, every trainer rank to the engine rank on its own GPU, from memory
there; on a CPU, and through a process group, rank 0 to all.

Invariants: every rank exhausts the iterator; memory is written again, or given back, only when those who read it have
said that they are done, or have been given up.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from miles.backends.base import ParallelState
from miles.backends.weight_update.bucket_copies import BucketCopies
from miles.backends.weight_update.bucket_memory import BucketMemory, DeviceMemory, MemoryFile
from miles.backends.weight_update.buckets import ALIGNMENT, Bucket, Entry
from miles.backends.weight_update.colocation import engine_of, gathered
from miles.backends.weight_update.connections import Connections
from miles.backends.weight_update.engine_calls import EngineCalls
from miles.backends.weight_update.lines import Lines
from miles.backends.weight_update.messages import WeightUpdate
from miles.backends.weight_update.own_memory import OwnBuckets, OwnMemory, entry_of
from miles.backends.weight_update.sender import CPU_BUCKET_BYTES, Sender
from miles.backends.weight_update.stream import Listener, address_towards, host_and_port
from miles.backends.weight_update.stream_update import Roles, Stream, all_ranks

T = TypeVar("T")
Weights = Iterator[tuple[str, torch.Tensor]]


class StreamSender(Sender):
    """What both ways have in common: connecting and ending."""

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        super().__init__(parallel, device)
        self._last: Stream | None = None
        self._connections = Connections()

    def _send(self, update: WeightUpdate, weights: Weights) -> None:
        roles = self._roles(update)
        if roles is None:
            return
        host = address_towards(*host_and_port(update.engines[0].url))
        timeout_s = update.timeout_s
        self._end_last(keep=True)
        lines = Lines(roles.expects, timeout_s)
        calls = EngineCalls(roles.speaks_to, timeout_s=timeout_s, connections=self._connections)
        with Listener(host, timeout_s) as listener:
            try:
                self._last = stream = Stream(update, listener, calls, lines, self._gathered)
            except BaseException:
                calls.close()
                raise
            try:
                self._pump(update, weights, stream)
            except BaseException:
                stream.hang_up()
                self._end_last()
                raise
            at = time.perf_counter()
            stream.hang_up()
            stream.settle()
            self._times["wait"] += time.perf_counter() - at
            self._times |= {"connect": stream.connect_s, "engine": calls.busy_s, "engine_copy": lines.engine_seconds}
            if calls.failures:
                self._end_last()
            calls.raise_failures(f"taking weight version {update.version}")

    def close(self) -> None:
        """Give everything back that is kept between updates."""
        self._end_last(at_once=True)
        self._give_back()

    @abstractmethod
    def _give_back(self) -> None:
        """Memory, or the process group."""

    def _end_last(self, *, at_once: bool = False, keep: bool = False) -> None:
        """The requests of the last update are over. ``keep``: connections stay for the next."""
        last, self._last = self._last, None
        if last is not None:
            last.end(at_once=at_once)
            last.calls.close()
        if not keep:
            self._connections.close()

    @abstractmethod
    def _roles(self, update: WeightUpdate) -> Roles | None:
        """None: engines are others' business. Raises BadUpdate."""

    @abstractmethod
    def _pump(self, update: WeightUpdate, weights: Weights, stream: Stream) -> None:
        """Send what the iterator yields."""

    def _gathered(self, value: T) -> list[T]:
        return [value]

    def _capacity(self, update: WeightUpdate) -> int:
        return min(update.bucket_bytes, CPU_BUCKET_BYTES) if self.device.type == "cpu" else update.bucket_bytes

    def _add(self, copies: BucketCopies, memory: torch.Tensor, entry: Entry, tensor: torch.Tensor) -> None:
        at = time.perf_counter()
        copies.add(memory, entry, tensor)
        self._times["copy"] += time.perf_counter() - at

    def _flush(self, copies: BucketCopies) -> None:
        at = time.perf_counter()
        copies.flush()
        self.await_device()
        self._times["copy"] += time.perf_counter() - at

    def await_device(self) -> None:
        """Until what is queued is done: engines read by other streams."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class SharedStreamSender(StreamSender):
    """``tensor``: engines map memory that is on their own CPU or GPU.

    On a CPU the two buffers are kept from update to update: fresh memory costs as much as copying into it. On a GPU
    their memory is the engine's in between.
    """

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        super().__init__(parallel, device)
        self.reads_only_first = device.type == "cpu"
        self._memories: tuple[BucketMemory, ...] = ()

    def _give_back(self) -> None:
        memories, self._memories = self._memories, ()
        for memory in memories:
            memory.close()

    def _send(self, update: WeightUpdate, weights: Weights) -> None:
        is_over = False
        try:
            super()._send(update, weights)
            is_over = True
        finally:
            if self.device.type == "cuda" or not is_over:  # else an engine may still read what was meant for it
                self._give_back()

    def _roles(self, update: WeightUpdate) -> Roles | None:
        if self.device.type == "cpu":
            return Roles(update.engines, all_ranks(update.engines)) if self.parallel.rank == 0 else None
        engine = engine_of(self.parallel, update)
        if engine is None:
            return Roles()
        rank = self.parallel.rank - (engine.rank_offset - 1)
        return Roles((engine,) if rank == 0 else (), ((engine.name, rank),))

    def _gathered(self, value: T) -> list[T]:
        return [value] if self.device.type == "cpu" else gathered(self.parallel, value)

    def _pump(self, update: WeightUpdate, weights: Weights, stream: Stream) -> None:
        if self.device.type == "cuda" and self.parallel.world_size > 1:
            stream.connect()  # later, others may already wait for this rank to gather
            if not stream.lines.peers:  # on a GPU without an engine: nobody would read what is copied
                for _ in weights:
                    pass
                return
        if not self._memories:
            make = MemoryFile if self.device.type == "cpu" else DeviceMemory
            self._memories = (make(), make())
        filling = _Filling(self, stream, self._memories, self._capacity(update))
        own = _Own(self, stream, OwnMemory(self._resident), update.bucket_bytes)
        for name, tensor in weights:
            if not own.takes(name, tensor):
                filling.take(name, tensor)
        own.hand_over()
        filling.hand_over()
        stream.connect()
        stream.lines.tell(lambda _: {"say": "end"})
        stream.lines.await_done()

    def hand_over(self, stream: Stream, entries: list[Entry], memory: dict[str, Any], *, stays: bool = False) -> int:
        """Returns the bucket's number. ``stays``: nothing is written there until the update is over."""
        stream.connect()
        number, self.num_buckets = self.num_buckets, self.num_buckets + 1
        message = {"say": "bucket", "number": number, "entries": [e.as_plain() for e in entries], "memory": memory}
        message |= {"stays": True} if stays else {}
        stream.lines.tell(lambda _: message)
        return number

    def await_loaded(self, stream: Stream, number: int) -> None:
        """Until nobody reads a bucket's memory any more."""
        at = time.perf_counter()
        stream.lines.await_loaded(number)
        self._times["wait"] += time.perf_counter() - at


class _Filling:
    """Buckets in memory for the purpose, which take turns: one is filled while engines load the other."""

    def __init__(
        self, sender: SharedStreamSender, stream: Stream, memories: tuple[BucketMemory, ...], capacity: int
    ) -> None:
        self._sender = sender
        self._stream = stream
        self._memories = memories
        self._numbers = [-1] * len(memories)
        self._capacity = capacity
        self._copies = BucketCopies(together=sender.device.type == "cuda")
        self._turn = 0
        self._bucket = Bucket(capacity)
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Copy it, after handing over what is full."""
        if not self._bucket.takes(tensor):
            self.hand_over()
        if not self._bucket.entries:
            self._sender.await_loaded(self._stream, self._numbers[self._turn])
            self._bytes = self._memories[self._turn].at_least(max(self._capacity, tensor.nbytes))
        self._sender._add(self._copies, self._bytes, self._bucket.add(name, tensor), tensor)

    def hand_over(self) -> None:
        """What there is."""
        if not self._bucket.entries:
            return
        self._sender._flush(self._copies)
        memory = self._memories[self._turn].describe()
        self._numbers[self._turn] = self._sender.hand_over(self._stream, self._bucket.entries, memory)
        self._bucket = Bucket(self._capacity, ALIGNMENT)
        self._turn = (self._turn + 1) % len(self._memories)


class _Own:
    """Buckets that are the model's own memory: nothing is copied here, and nothing is written until the update ends."""

    def __init__(self, sender: SharedStreamSender, stream: Stream, memory: OwnMemory, capacity: int) -> None:
        self._sender = sender
        self._stream = stream
        self._memory = memory
        self._capacity = capacity
        self._buckets = OwnBuckets()

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it goes this way; if so, it is on its way."""
        description = self._memory.description(tensor)
        if description is None:
            return False
        self._buckets.add(description, entry_of(name, tensor))
        if self._buckets.num_bytes >= self._capacity:
            self.hand_over()
        return True

    def hand_over(self) -> None:
        """What there is."""
        buckets = self._buckets.take()
        if buckets:
            self._sender.await_device()
        for entries, description in buckets:
            self._sender.hand_over(self._stream, entries, description, stays=True)
