"""Weight updates by CUDA IPC into a real engine, beside a copy of the same bytes within the GPU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from gpu_bench.facts import copy_seconds
from gpu_bench.memory import MemoryWatch
from gpu_bench.model import model
from gpu_bench.results import Results
from gpu_bench.training import checksums_said
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.environment import engine_environment
from miles.backends.sglang_utils.server_arguments import server_arguments
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate

BUCKETS = (128 << 20, 512 << 20, 2 << 30)
UPDATES = 12
_START_S = 300.0


def engine_config(path: Path) -> dict[str, Any]:
    """Of a run that is as small as the engine needs."""
    return {
        "device": "cuda", "params_dtype": "bfloat16", "hf_checkpoint": str(path), "offload_rollout": True, "seed": 0,
        "hf_config": json.loads((path / "config.json").read_text()), "rollout_num_gpus_per_engine": 1,
        "sglang_attention_backend": "triton", "sglang_sampling_backend": "pytorch", "sglang_grammar_backend": "none",
        "sglang_mem_fraction_static": 0.4, "sglang_cuda_graph_backend_prefill": "disabled",
    }  # fmt: skip


@contextlib.asynccontextmanager
async def engine(out: Path, path: Path, name: str) -> AsyncIterator[EngineClient]:
    """SGLang as our launcher starts it, on the first GPU, until the context is left."""
    http, nccl = free_ports(2)
    command = [sys.executable, "-m", "miles.backends.sglang_utils.launch_engine", "127.0.0.1"]
    command += [json.dumps({"http": http, "nccl": nccl}), json.dumps(server_arguments(engine_config(path), 0))]
    added = engine_environment("cuda", index=0, tp_size=1, colocate=True, inherited=os.environ, device_ids=["0"])
    with (out / f"{name}.engine.log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **added}, stdout=log, stderr=log)  # noqa: ASYNC220
    client = EngineClient(f"http://127.0.0.1:{http}", name=name)
    try:
        deadline = time.monotonic() + _START_S
        while not await client.health(timeout_s=5.0):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the engine did not come up; see {name}.engine.log")
            await asyncio.sleep(0.5)
        yield client
    finally:
        await client.close()
        process.terminate()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ipc(results: Results) -> None:
    """See the module's docstring."""
    asyncio.run(_ipc(results))


async def _ipc(results: Results) -> None:
    import torch

    path = model(results.out, "0.6B")
    began = time.monotonic()
    with MemoryWatch() as watch:
        async with engine(results.out, path, "ipc") as client:
            results.add("engine start", time.monotonic() - began, "s")
            answer = await client.generate([1, 2, 3], {"max_new_tokens": 8, "temperature": 1.0})
            results.add("tokens of a first answer", len(answer["output_ids"]))
            weights = weights_of(path)
            num_bytes = sum(tensor.nbytes for _, tensor in weights)
            copying = copy_seconds(num_bytes)
            results.add(
                "copy of the same bytes within the GPU",
                copying * 1e3,
                "ms",
                f"{num_bytes} bytes, {len(weights)} tensors",
            )
            first, _ = await client.checksums()
            target = EngineTarget(client.name, client.url, "", 1, 1, has_bracket=False)
            version = 0
            for bucket in BUCKETS:
                found = await asyncio.to_thread(_repeat, target, weights, bucket, version)
                version += UPDATES
                _tell(results, bucket, found, copying)
                results.add(
                    f"GPU in use after updates of {bucket >> 20} MiB buckets", watch.samples[-1].used / 1e9, "GB"
                )
            for _, tensor in weights:
                tensor.mul_(1 + 0.05 * torch.rand((), device=tensor.device).to(tensor.dtype))
            await asyncio.to_thread(_send, target, weights, BUCKETS[1], version + 1)
            held, _ = await client.checksums()
            export = export_of(results.out / "export-ipc", path, weights)
            await client.update_weights_from_disk(str(export), version=version + 2)
            loaded, _ = await client.checksums()
            results.add("checksum after IPC equals that after loading from disk", str(held == loaded), note=held[:16])
            results.add("it differs from the first weights'", str(held != first), note=first[:16])
            await _hand_over(results, client, watch)


def weights_of(path: Path) -> list[tuple[str, Any]]:
    """Names and tensors on the GPU, as the trainer's backend yields them."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors"))
    return [(name, tensor) for file in files for name, tensor in load_file(file, device="cuda:0").items()]


def export_of(export: Path, path: Path, weights: Sequence[tuple[str, Any]]) -> Path:
    """A Hugging Face directory with these weights and everything else of ``path``."""
    from safetensors.torch import save_file

    export.mkdir(exist_ok=True)
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, export)
    save_file({name: tensor.cpu() for name, tensor in weights}, export / "model.safetensors", metadata={"format": "pt"})
    return export


def _send(target: EngineTarget, weights: Sequence[tuple[str, Any]], bucket: int, version: int) -> dict[str, float]:
    import torch

    from miles.backends.base import ParallelState
    from miles.backends.weight_update.sender import make_sender

    update = WeightUpdate(version, (target,), "tensor", bucket)
    sender = make_sender(ParallelState(), update, torch.device("cuda", 0))
    found: dict[str, float] = sender.send(update, iter(weights))
    sender.close()
    return {**found, "num_buckets": float(sender.num_buckets)}


def _repeat(
    target: EngineTarget, weights: Sequence[tuple[str, Any]], bucket: int, version: int
) -> list[dict[str, float]]:
    """The first two warm up."""
    return [_send(target, weights, bucket, version + 1 + turn) for turn in range(UPDATES)][2:]


def _tell(results: Results, bucket: int, found: Sequence[dict[str, float]], copying: float) -> None:
    median = {name: statistics.median(each[name] for each in found) for name in found[0]}
    parts = ", ".join(f"{name} {1e3 * median[name]:.1f}" for name in ("gather", "copy", "wait", "engine"))
    results.add(
        f"update in buckets of {bucket >> 20} MiB", median["total"] * 1e3, "ms",
        f"{median['total'] / copying:.1f} copies; ms: {parts}; {median['num_buckets']:.0f} buckets; "
        f"least {1e3 * min(each['total'] for each in found):.1f}",
    )  # fmt: skip


async def _hand_over(results: Results, client: EngineClient, watch: MemoryWatch) -> None:
    """Release and take back, ten times: what the engine holds when it has nothing, and whether that grows."""
    me, empty, full, seconds = os.getpid(), [], [], []
    for _ in range(10):
        began = time.perf_counter()
        await client.release_memory()
        middle = time.perf_counter()
        await asyncio.sleep(0.15)
        empty.append(sum(used for pid, used in watch.samples[-1].by_pid.items() if pid != me))
        again = time.perf_counter()
        await client.resume_memory()
        seconds.append((middle - began, time.perf_counter() - again))
        await asyncio.sleep(0.15)
        full.append(sum(used for pid, used in watch.samples[-1].by_pid.items() if pid != me))
    share = 100 / watch.total
    results.add(
        "engine with its memory",
        full[-1] / 1e9,
        "GB",
        f"first {full[0] * share:.2f} %, last {full[-1] * share:.2f} % of the GPU",
    )
    results.add(
        "engine without",
        empty[-1] / 1e9,
        "GB",
        f"first {empty[0] * share:.2f} %, last {empty[-1] * share:.2f} % of the GPU",
    )
    for name, values in (("release", [each[0] for each in seconds]), ("resume", [each[1] for each in seconds])):
        results.add(f"{name} of an engine's memory", statistics.median(values) * 1e3, "ms")


def fresh_engine(results: Results) -> None:
    """The engine of a finished run held what an engine holds that is started on the run's export."""
    asyncio.run(_fresh_engine(results))


async def _fresh_engine(results: Results) -> None:
    out = results.out
    finished = [backend for backend in ("megatron", "fsdp") if (out / f"export-{backend}" / "config.json").exists()]
    for backend in finished:
        said = checksums_said(out / f"run-{backend}")
        async with engine(out, out / f"export-{backend}", f"fresh-{backend}") as client:
            fresh, _ = await client.checksums()
        last = max(said, default=0)
        results.add(
            f"{backend}: a fresh engine has the run's checksum",
            str(said.get(last) == fresh),
            note=f"version {last}, {fresh[:16]}",
        )
