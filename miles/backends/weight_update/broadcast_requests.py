"""Weight updates by broadcast into engines that we did not start: through SGLang's own requests. Needs torch.

One request per bucket names the tensors; SGLang lays them out itself, without gaps, and takes the bytes from the
process group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from miles.backends.base import ParallelState
from miles.backends.weight_update.broadcast_group import JOIN_S, BroadcastGroup, Gathering, has_arrived
from miles.backends.weight_update.buckets import Bucket
from miles.backends.weight_update.engine_calls import EngineCalls, Pending
from miles.backends.weight_update.failures import not_made
from miles.backends.weight_update.messages import WeightUpdate
from miles.backends.weight_update.sender import CPU_BUCKET_BYTES, Sender, at_least, update_body
from miles.backends.weight_update.stream import address_towards, host_and_port

logger = logging.getLogger(__name__)
_BLAME_S = 0.5
_LOOK_EVERY_S = 0.0005


class BroadcastRequestSender(Sender):
    """``broadcast`` without streams: a process group of trainer rank 0 and all engines' ranks, kept between updates."""

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        super().__init__(parallel, device)
        self.reads_only_first = True
        self._group: BroadcastGroup | None = None
        self._members: tuple[tuple[str, str], ...] = ()
        self._name = ""
        self._timeout_s = JOIN_S

    def close(self) -> None:
        """Leave the process group."""
        if self._group is not None:
            group, self._group = self._group, None
            group.close()

    def _send(self, update: WeightUpdate, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.parallel.rank != 0:
            return
        self._timeout_s = update.timeout_s
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
        those who are done because of that, until nobody waits. Only who failed before that is a cause.
        """
        causes = _causes(requests)
        body, told = {"group_name": update.group_name}, set[str]()
        while len(told) < len(requests.futures):
            done = set(requests.done) - told
            calls.tell_all("/destroy_weights_update_group", body, names=done)
            told |= done
            self.close()
            time.sleep(_LOOK_EVERY_S)  # each request has a deadline of its own
        calls.finish(requests)
        if causes:
            calls.failures = {name: why for name, why in calls.failures.items() if name in causes}

    def _joined(self, update: WeightUpdate, calls: EngineCalls) -> BroadcastGroup:
        group, members = self._group, tuple((engine.name, engine.url) for engine in update.engines)
        if group is not None and not update.new_group and self._members == members:
            return group
        self.close()
        # Engines may be in a group of this name: of ours before, or of a trainer that is gone. If not, they say so.
        calls.tell_all("/destroy_weights_update_group", {"group_name": update.group_name})
        self._group, self._members, self._name = self._made(update, calls), members, update.group_name
        return self._group

    def _made(self, update: WeightUpdate, calls: EngineCalls) -> BroadcastGroup:
        """Raises GroupNotMade: not everybody joined in time, with what the engines said."""
        size = 1 + sum(engine.tp_size for engine in update.engines)
        host = address_towards(*host_and_port(update.engines[0].url))
        gathering = Gathering(host, size, self.device, prefixed=update.group_name)
        body = {"master_address": host, "master_port": gathering.port, "world_size": size}
        body |= {"group_name": update.group_name, "backend": "nccl" if self.device.type == "cuda" else "gloo"}
        pending = calls.start("/init_weights_update_group", lambda engine: {**body, "rank_offset": engine.rank_offset})
        found = gathering.wait(lambda: pending.has_failed)
        calls.finish(pending)
        if isinstance(found, BroadcastGroup) and not calls.failures:
            return found
        if isinstance(found, BroadcastGroup):
            found.close()
        raise not_made(update, calls.failures, found if isinstance(found, str) else "")

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
            "group_name": self._name,
        }
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies into the bucket went their own way
        requests = calls.start("/update_weights_from_distributed", lambda _: body)
        at = time.perf_counter()
        why = group.connect(lambda: requests.has_failed, min(JOIN_S, self._timeout_s))
        self._times["connect"] += time.perf_counter() - at
        if why:
            logger.warning("no NCCL communicator of trainer and engines came about: %s", why)
            raise _Broken(requests)
        return requests, group.broadcast([memory[: bucket.num_bytes]])

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
        if requests.has_failed or not has_arrived(work):
            raise _Broken(requests)
        self._finish(calls, requests)


def _causes(requests: Pending) -> list[str]:
    """Engines that failed of their own. One that has ended may be heard of after one that was cut off by it, and which
    says so."""
    first, until = requests.failed, time.monotonic() + _BLAME_S
    while not requests.gone and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
    return requests.gone or first


class _Broken(Exception):
    """A broadcast did not reach everybody."""

    def __init__(self, requests: Pending) -> None:
        super().__init__("a broadcast did not reach everybody")
        self.requests = requests
