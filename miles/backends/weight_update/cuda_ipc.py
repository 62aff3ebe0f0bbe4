"""Colocated on GPUs, into engines that take no streams (those that speculate load two models per request): buckets
handed over by SGLang's own requests as CUDA IPC handles, one payload per rank of an engine. Needs SGLang here.

Every trainer rank holds every full tensor, so each fills a bucket of its own, on its own GPU, and the engine rank on
the same GPU maps that one. The first trainer rank of an engine collects the payloads and speaks to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from miles.backends.weight_update.buckets import ALIGNMENT, Bucket
from miles.backends.weight_update.colocation import engine_of, gathered
from miles.backends.weight_update.engine_calls import EngineCalls, Pending
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.sender import Sender, at_least, update_body

T = TypeVar("T")


class CudaIpcSender(Sender):
    """``tensor`` on CUDA."""

    def _send(self, update: WeightUpdate, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        engine = engine_of(self.parallel, update)
        speaks = engine is not None and self.parallel.rank == engine.rank_offset - 1
        mine = (engine,) if engine is not None and speaks else ()
        with EngineCalls(mine, timeout_s=update.timeout_s) as calls:
            self._pump(update, weights, calls)
            # All ranks tell of all engines, as only one rank's error is heard. Also a barrier: nobody lets go of memory
            # that another rank's engine may still read.
            for failures in self._gathered(calls.failures):
                calls.failures |= failures
            calls.raise_failures(f"taking weight version {update.version}")

    def _pump(self, update: WeightUpdate, weights: Iterator[tuple[str, torch.Tensor]], calls: EngineCalls) -> None:
        memories = [torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(2)]
        bucket, pending, turn = Bucket(update.bucket_bytes, ALIGNMENT), None, 0
        for name, tensor in weights:
            if not bucket.takes(tensor):
                self._finish(calls, pending)
                pending = self._hand_over(calls, memories[turn], bucket)
                bucket, turn = Bucket(update.bucket_bytes, ALIGNMENT), 1 - turn
            bucket.add(name, tensor)
            memories[turn] = at_least(memories[turn], bucket)
            self._copy(memories[turn], bucket, tensor)
        self._finish(calls, pending)
        self._finish(calls, self._hand_over(calls, memories[turn], bucket))

    def _hand_over(self, calls: EngineCalls, memory: torch.Tensor, bucket: Bucket) -> Pending:
        torch.cuda.synchronize(self.device)
        self.num_buckets += 1
        # Also a barrier: when it returns, the engines have loaded the bucket before, and its memory may be filled.
        payloads = self._gathered(ipc_payload(memory, bucket))

        def body(engine: EngineTarget) -> dict[str, Any]:
            first = engine.rank_offset - 1
            mine = payloads[first : first + engine.tp_size]
            return update_body("flattened_bucket") | {"serialized_named_tensors": mine}

        return calls.start("/update_weights_from_tensor", body)

    def _gathered(self, value: T) -> list[T]:
        return gathered(self.parallel, value)


def ipc_payload(memory: torch.Tensor, bucket: Bucket) -> str:
    """What SGLang's ``flattened_bucket`` takes: handle of the memory, and what lies where."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    monkey_patch_torch_reductions()  # handles name GPUs by UUID: the engine counts its devices differently
    metadata = [
        FlattenedTensorMetadata(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=entry.dtype,
            start_idx=entry.start,
            end_idx=entry.start + entry.num_bytes,
            numel=entry.num_bytes,
        )
        for entry in bucket.entries
    ]
    value = {"flattened_tensor": memory[: bucket.num_bytes], "metadata": metadata}
    return str(MultiprocessingSerializer.serialize(value, output_str=True))
