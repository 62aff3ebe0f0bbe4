"""Weight updates by NCCL into a real engine on another GPU, beside a bare broadcast of the same bytes."""

from __future__ import annotations

import asyncio
import os

from gpu_bench.ipc import compare, engine
from gpu_bench.model import config_only, model
from gpu_bench.results import Results
from gpu_bench.training import bare_broadcast
from gpu_bench.updates import Updates, num_bytes_of, random_weights, tell
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate

BUCKETS = (512 << 20, 1 << 30)


def nccl(results: Results) -> None:
    """Sender on the first GPU, engine on the second."""
    bare = {shape: _bare(results, shape) for shape in ("0.6B", "8B")}
    os.environ["NCCL_CUMEM_ENABLE"] = "0"  # as ranks of a trainer have it, and engines
    for shape, seconds in bare.items():
        asyncio.run(_updates(results, shape, seconds))


def _bare(results: Results, shape: str) -> float:
    """Seconds of a bare broadcast of the model's bytes."""
    num_bytes = num_bytes_of(random_weights(config_only(results.out, shape), "meta", in_one=False)[0])
    seconds = bare_broadcast(results.out, num_bytes, 2)
    rate = num_bytes / seconds / 1e9
    results.add(f"{shape}: bare NCCL broadcast", rate, "GB/s", f"{num_bytes} bytes, {1e3 * seconds:.2f} ms")
    return seconds


async def _updates(results: Results, shape: str, bare: float) -> None:
    import torch

    small, device = shape == "0.6B", torch.device("cuda", 0)
    path = model(results.out, shape) if small else config_only(results.out, shape)
    weights, _ = random_weights(path, device, in_one=False)
    num_bytes, version = num_bytes_of(weights), 1
    async with engine(results.out, path, f"nccl-{shape}", gpu=1, dummy=not small) as client:
        for streams in (True, False):
            target = EngineTarget(client.name, client.url, "", 1, 1, has_bracket=False, has_stream=streams)
            for bucket in BUCKETS if streams else BUCKETS[:1]:
                updates = Updates(WeightUpdate(version, (target,), "broadcast", bucket), device)
                found = await asyncio.to_thread(updates.repeat, weights)
                version = updates.version
                updates.close()
                how = f"{'stream' if streams else 'requests of SGLang'}, buckets of {bucket >> 20} MiB"
                seconds = tell(results, f"{shape}: update by {how}", found, bare, "the bare broadcast")
                results.add(
                    f"{shape}: {how}", num_bytes / seconds / 1e9, "GB/s", f"{bare / seconds:.2f} of the bare broadcast"
                )
        if small:
            await compare(results, client, path, weights, version)
