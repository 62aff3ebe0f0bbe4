"""Weight updates by NCCL into real engines on other GPUs, beside a bare broadcast of the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence

from gpu_bench import rehearsal
from gpu_bench.ipc import compare, engine
from gpu_bench.model import config_only, model
from gpu_bench.placing import SHARED, is_shared
from gpu_bench.results import Results
from gpu_bench.training import bare_broadcast
from gpu_bench.updates import Updates, Weights, num_bytes_of, random_weights, tell
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate

BUCKETS = (512 << 20, 1 << 30)
LARGE = "8B"


def nccl(results: Results) -> None:
    """Sender on the first GPU, engine on the second. The large model comes first: it is what the others are judged by.
    Raises ExceptionGroup with what failed, when all has been tried."""
    bare = {shape: bare_seconds(results, shape, (0, 1)) for shape in (LARGE, "0.6B")}
    os.environ["NCCL_CUMEM_ENABLE"] = "0"  # as ranks of a trainer have it, and engines
    failed = []
    for shape, seconds in bare.items():
        try:
            asyncio.run(_updates(results, shape, seconds))
        except Exception as error:  # noqa: BLE001  # the other model is tried all the same
            results.add(f"{shape}: updates", "failed", note=f"{type(error).__name__}: {error}"[:600])
            failed.append(error)
    if failed:
        raise ExceptionGroup("updates failed", failed)


def bare_seconds(results: Results, shape: str, group: Sequence[int]) -> float:
    """Of a bare broadcast of the model's bytes among ranks on these GPUs; 0 in a rehearsal. Raises RunFailed."""
    if rehearsal.is_rehearsal():
        return 0.0
    num_bytes = num_bytes_of(random_weights(config_only(results.out, shape), "meta", in_one=False)[0])
    seconds = bare_broadcast(results.out, num_bytes, group)
    rate = num_bytes / seconds / 1e9
    over = f" over {len(group)} GPUs" if len(group) > 2 else ""
    if is_shared(group):
        over = f" over {len(group)} ranks, {SHARED}"
    results.add(f"{shape}: bare NCCL broadcast{over}", rate, "GB/s", f"{num_bytes} bytes, {1e3 * seconds:.2f} ms")
    return seconds


async def _updates(results: Results, shape: str, bare: float) -> None:
    import torch

    small = shape != LARGE
    device = torch.device("cpu") if rehearsal.is_rehearsal() else torch.device("cuda", 0)
    path = model(results.out, shape) if small else config_only(results.out, rehearsal.shape(shape))
    weights, _ = random_weights(path, device, in_one=False)
    version = 1
    async with engine(results.out, path, f"nccl-{shape}", gpus=(1,), dummy=not small) as client:
        for streams in (True, False) if small else (True,):
            for bucket in BUCKETS if streams else BUCKETS[:1]:
                target = target_of(client, 1, streams=streams)
                update = WeightUpdate(version, (target,), "broadcast", bucket)
                async with bracket(client):
                    version = await _measured(results, shape, update, weights, bare)
            if small:
                await compare(results, client, path, weights, version)
                version += 1


def target_of(client: EngineClient, ranks: int, *, streams: bool = True) -> EngineTarget:
    """The only engine of an update."""
    return EngineTarget(client.name, client.url, "", ranks, 1, has_bracket=False, has_stream=streams)


async def _measured(results: Results, shape: str, first: WeightUpdate, weights: Weights, bare: float) -> int:
    """Updates from ``first`` on. Returns the next version."""
    updates = Updates(first, weights[0][1].device)
    found = await asyncio.to_thread(updates.repeat, weights)
    updates.close()
    kind = "stream" if first.engines[0].has_stream else "requests of SGLang"
    how = f"{kind}, buckets of {first.bucket_bytes >> 20} MiB"
    seconds = tell(results, f"{shape}: update by {how}", found, bare, "the bare broadcast")
    rate = num_bytes_of(weights) / seconds / 1e9
    results.add(f"{shape}: {how}", rate, "GB/s", f"{bare / seconds:.2f} of the bare broadcast")
    return updates.version


@contextlib.asynccontextmanager
async def bracket(client: EngineClient) -> AsyncIterator[None]:
    """What some versions of SGLang need around updates; the controller's part."""
    wants = await client.has_bracket()
    if wants:
        await client.begin_weight_update()
    try:
        yield
    finally:
        if wants:
            await client.end_weight_update()
