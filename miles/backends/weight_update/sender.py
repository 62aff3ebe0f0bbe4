"""The trainer's side of a weight update: takes full tensors, moves them to the engines in buckets. Needs torch.

* Consumes: the ``WeightUpdate`` that the controller ordered, and name and tensor of every weight as
  ``TrainBackend.hf_weights`` yields them. Produces: engines that hold them, and how long each part took.
* Waits for: engines' answers and broadcasts, each with a deadline.
* Invariants: on every rank the iterator is exhausted, whatever happens to engines, since it gathers from all ranks; no
  bucket's memory is written while an engine may read it; the engines of a failed update are named.

Two buckets take turns: the next is gathered and filled while the engines load the one before.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.server_arguments import MAP_WEIGHTS
from miles.backends.weight_update.broadcast_group import BroadcastGroup, members_of
from miles.backends.weight_update.buckets import Bucket, copy_into
from miles.backends.weight_update.engine_calls import EngineCalls, Pending
from miles.backends.weight_update.failures import BadUpdate
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.shared_memory import SharedBuffer, payload_of

CPU_BUCKET_BYTES = 32 << 20
"""The most that one bucket holds on a CPU. Fresh memory costs several times what copying does: small buckets that take
turns stay warm, and overlap better. Measured with 95M parameters in fp32: 32 MiB 0.25 s, 512 MiB 1.6 s."""
_LOOK_EVERY_S = 0.0005


def make_sender(parallel: ParallelState, update: WeightUpdate, device: torch.device, config: object = None) -> Sender:
    """This rank's sender for updates by the method of ``update``. All ranks must call it alike."""
    if update.method == "broadcast":
        return BroadcastSender(parallel, device)
    if device.type == "cuda":
        from miles.backends.weight_update.cuda_ipc import CudaIpcSender

        return CudaIpcSender(parallel, device)
    return SharedMemorySender(parallel, device)


class Sender(ABC):
    """Moves weights to engines, update after update. ``close`` it at the end."""

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        self.parallel = parallel
        self.device = device
        self._begin()

    def send(self, update: WeightUpdate, hf_weights: Iterator[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Send everything. Returns seconds by part:

        ``gather`` (until the iterator had the next tensor), ``copy`` (into the bucket), ``wait`` (for engines, with
        nothing else to do), ``engine`` (requests, also where they overlap with the former), ``engine_copy`` (of those:
        loading in the engine, where it tells), ``total``. ``num_bytes`` and ``num_buckets`` say how much it was.

        Raises:
            BadUpdate: this cannot be done.
            EnginesMissedUpdate, GroupNotMade: with ``fields["engines"]``. The iterator is exhausted all the same.
        """
        start = time.perf_counter()
        self._begin()
        weights = self._timed(hf_weights)
        try:
            check(update)
            self._send(update, weights)
        finally:
            for _ in weights:  # other ranks wait in the same collectives
                pass
        return {**self._times, "total": time.perf_counter() - start}

    def close(self) -> None:  # noqa: B027  # most keep nothing between updates
        """Give process groups back."""

    def _begin(self) -> None:
        self._times = dict.fromkeys(("gather", "copy", "wait", "engine", "engine_copy"), 0.0)
        self.num_bytes = 0
        self.num_buckets = 0

    @abstractmethod
    def _send(self, update: WeightUpdate, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Move what the iterator yields."""

    def _timed(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        iterator = iter(weights)
        while True:
            at = time.perf_counter()
            item = next(iterator, None)
            self._times["gather"] += time.perf_counter() - at
            if item is None:
                return
            self.num_bytes += item[1].nbytes
            yield item

    def _copy(self, memory: torch.Tensor, bucket: Bucket, tensor: torch.Tensor) -> None:
        at = time.perf_counter()
        copy_into(memory, bucket.entries[-1], tensor)
        self._times["copy"] += time.perf_counter() - at

    def _finish(self, calls: EngineCalls, pending: Pending | None) -> None:
        at = time.perf_counter()
        calls.finish(pending)
        self._times["wait"] += time.perf_counter() - at
        self._times["engine"] = calls.busy_s


class SharedMemorySender(Sender):
    """``tensor`` on a CPU: engines map the buckets. Only rank 0 has anything to do with engines.

    The two buffers are kept from update to update: fresh memory costs as much as copying into it.
    """

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        super().__init__(parallel, device)
        self._buffers: tuple[SharedBuffer, SharedBuffer] | None = None

    def close(self) -> None:
        """Give the buffers back."""
        buffers, self._buffers = self._buffers, None
        for buffer in buffers or ():
            buffer.close()

    def _send(self, update: WeightUpdate, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.parallel.rank != 0:
            return
        if self._buffers is None:
            self._buffers = SharedBuffer(), SharedBuffer()
        try:
            with EngineCalls(update.engines, timeout_s=update.timeout_s) as calls:
                self._pump(update, weights, self._buffers, calls)
                calls.raise_failures(f"taking weight version {update.version}")
        except BaseException:
            self.close()  # an engine may still read what was meant for it
            raise

    def _pump(
        self,
        update: WeightUpdate,
        weights: Iterator[tuple[str, torch.Tensor]],
        buffers: tuple[SharedBuffer, SharedBuffer],
        calls: EngineCalls,
    ) -> None:
        capacity = min(update.bucket_bytes, CPU_BUCKET_BYTES)
        filled, loading = buffers
        bucket, pending = Bucket(capacity), None
        for name, tensor in weights:
            if not bucket.takes(tensor):
                self._loaded(calls, pending, loading)
                pending = self._load(calls, filled, bucket, last=False)
                filled, loading, bucket = loading, filled, Bucket(capacity)
            bucket.add(name, tensor)
            self._copy(filled.memory(max(capacity, bucket.num_bytes)), bucket, tensor)
        self._loaded(calls, pending, loading)
        self._loaded(calls, self._load(calls, filled, bucket, last=True), filled)

    def _load(self, calls: EngineCalls, buffer: SharedBuffer, bucket: Bucket, *, last: bool) -> Pending:
        payload = payload_of(buffer.describe(bucket, first=self.num_buckets == 0, last=last))
        self.num_buckets += 1

        def body(engine: EngineTarget) -> dict[str, Any]:
            return update_body(MAP_WEIGHTS) | {"serialized_named_tensors": [payload] * engine.tp_size}

        return calls.start("/update_weights_from_tensor", body)

    def _loaded(self, calls: EngineCalls, pending: Pending | None, buffer: SharedBuffer) -> None:
        self._finish(calls, pending)
        if pending is not None and not calls.failures:
            self._times["engine_copy"] += buffer.engine_times[1]


class BroadcastSender(Sender):
    """``broadcast``: one process group of trainer rank 0 and all engines' ranks, kept from update to update."""

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        super().__init__(parallel, device)
        self._group: BroadcastGroup | None = None

    def close(self) -> None:
        """Leave the process group."""
        if self._group is not None:
            group, self._group = self._group, None
            group.close()

    def _send(self, update: WeightUpdate, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.parallel.rank != 0:
            return
        with EngineCalls(update.engines, timeout_s=update.timeout_s) as calls:
            requests = None
            try:
                self._pump(update, weights, self._joined(update, calls), calls)
            except _Broken as broken:
                requests = broken.requests
            except BaseException:
                self.close()
                raise
            # Not above: the error's frames hold the broadcast, and so the group's connections, for as long as it lives.
            if requests is not None:
                self._break_up(update, calls, requests)
                calls.raise_failures(f"taking weight version {update.version}", names=[e.name for e in update.engines])

    def _break_up(self, update: WeightUpdate, calls: EngineCalls, requests: Pending) -> None:
        """Somebody did not take part in a broadcast, and others wait for them, for us, and for each other.

        Whoever leaves the group ends the waiting of those who wait for them: first those who are done, then we, then
        those who are done because of that, until nobody waits.
        """
        body, told = {"group_name": update.group_name}, set[str]()
        while len(told) < len(requests.futures):
            done = set(requests.done) - told
            calls.tell_all("/destroy_weights_update_group", body, names=done)
            told |= done
            self.close()
            time.sleep(_LOOK_EVERY_S)  # each request has a deadline of its own
        calls.finish(requests)

    def _joined(self, update: WeightUpdate, calls: EngineCalls) -> BroadcastGroup:
        group = self._group
        if group is not None and not update.new_group and group.members == members_of(update):
            return group
        self.close()
        # Engines may be in a group of this name: of ours before, or of a trainer that is gone. If not, they say so.
        calls.tell_all("/destroy_weights_update_group", {"group_name": update.group_name})
        self._group = BroadcastGroup.join(update, calls, self.device)
        return self._group

    def _pump(
        self,
        update: WeightUpdate,
        weights: Iterator[tuple[str, torch.Tensor]],
        group: BroadcastGroup,
        calls: EngineCalls,
    ) -> None:
        on_cpu = self.device.type == "cpu"
        capacity = min(update.bucket_bytes, CPU_BUCKET_BYTES) if on_cpu else update.bucket_bytes
        memories = [torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(2)]
        bucket, pending, turn = Bucket(capacity, 1), None, 0
        for name, tensor in weights:
            if not bucket.takes(tensor):
                self._finish_broadcast(calls, pending)
                pending = self._broadcast(calls, group, memories[turn], bucket)
                bucket, turn = Bucket(capacity, 1), 1 - turn
            bucket.add(name, tensor)
            memories[turn] = at_least(memories[turn], bucket)
            self._copy(memories[turn], bucket, tensor)
        self._finish_broadcast(calls, pending)
        self._finish_broadcast(calls, self._broadcast(calls, group, memories[turn], bucket))

    def _broadcast(
        self, calls: EngineCalls, group: BroadcastGroup, memory: torch.Tensor, bucket: Bucket
    ) -> tuple[Pending, Any]:
        self.num_buckets += 1
        body = update_body("flattened_bucket") | {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [entry.dtype_name for entry in bucket.entries],
            "shapes": [list(entry.shape) for entry in bucket.entries],
            "group_name": group.name,
        }
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies into the bucket went their own way
        requests = calls.start("/update_weights_from_distributed", lambda _: body)
        return requests, group.broadcast(memory[: bucket.num_bytes])

    def _finish_broadcast(self, calls: EngineCalls, pending: tuple[Pending, Any] | None) -> None:
        """Raises _Broken at once if an engine refused or is gone: others may wait for it, as data goes from one to the
        other, and so may this broadcast."""
        if pending is None:
            return
        requests, work = pending
        at = time.perf_counter()
        while len(requests.done) < len(requests.futures) and not requests.has_failed:
            time.sleep(_LOOK_EVERY_S)
        while not work.is_completed() and not requests.has_failed:
            time.sleep(_LOOK_EVERY_S)
        self._times["wait"] += time.perf_counter() - at
        if requests.has_failed or not work.is_success():
            raise _Broken(requests)
        self._finish(calls, requests)


class _Broken(Exception):
    """A broadcast did not reach everybody."""

    def __init__(self, requests: Pending) -> None:
        super().__init__("a broadcast did not reach everybody")
        self.requests = requests


def at_least(memory: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """Memory that holds the bucket, with what it holds already. Grows towards the bucket's capacity in few steps."""
    if memory.numel() >= bucket.num_bytes:
        return memory
    size = max(bucket.num_bytes, min(bucket.capacity, max(4 * memory.numel(), 1 << 20)))
    larger = torch.empty(size, dtype=torch.uint8, device=memory.device)
    larger[: memory.numel()] = memory
    return larger


def update_body(load_format: str) -> dict[str, Any]:
    """What all requests with weights have in common. The cache was flushed before, once."""
    return {"load_format": load_format, "flush_cache": False}


def check(update: WeightUpdate) -> None:
    """Raises BadUpdate."""
    if not update.engines or update.bucket_bytes < 1:
        raise BadUpdate(
            "a weight update has no engine to go to, or no room for a bucket",
            evidence=f"engines: {len(update.engines)}, bucket: {update.bucket_bytes} bytes",
            advice="Set --update-weight-buffer-size to at least the size of a layer, and start at least one engine.",
        )
