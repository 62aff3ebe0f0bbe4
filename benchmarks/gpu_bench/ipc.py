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
from gpu_bench.model import config_only, model
from gpu_bench.rehearsal import is_rehearsal
from gpu_bench.results import Results
from gpu_bench.runs import visible
from gpu_bench.training import checksums_said
from gpu_bench.updates import Updates, Weights, num_bytes_of, random_weights, tell
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.environment import engine_environment
from miles.backends.sglang_utils.server_arguments import server_arguments
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate

BUCKETS = (128 << 20, 512 << 20, 2 << 30)
_START_S = 300.0


def engine_config(path: Path, ranks: int = 1, max_tokens: int = 0) -> dict[str, Any]:
    """Of a run that is as small as the engine needs. With ``max_tokens`` others may take memory beside it while it
    starts, as it does not go by a share of the GPU."""
    run = {
        "params_dtype": "bfloat16", "hf_checkpoint": str(path), "offload_rollout": True, "seed": 0,
        "hf_config": json.loads((path / "config.json").read_text()), "rollout_num_gpus_per_engine": ranks,
    }  # fmt: skip
    if is_rehearsal():
        return run | {"device": "cpu", "sglang_max_total_tokens": 4096}
    return run | {
        "device": "cuda",
        "sglang_attention_backend": "triton", "sglang_sampling_backend": "pytorch", "sglang_grammar_backend": "none",
        "sglang_mem_fraction_static": 0.4, "sglang_cuda_graph_backend_prefill": "disabled",
        **({"sglang_mem_fraction_static": 0.8, "sglang_max_total_tokens": max_tokens} if max_tokens else {}),
    }  # fmt: skip


@contextlib.asynccontextmanager
async def engine(
    out: Path, path: Path, name: str, *, gpus: Sequence[int] = (0,), dummy: bool = False, max_tokens: int = 0
) -> AsyncIterator[EngineClient]:
    """SGLang as our launcher starts it, spread over these GPUs, until the context is left. ``dummy``: with random
    weights. ``max_tokens``: of the KV cache; 0: as many as fit."""
    http, nccl = free_ports(2)
    config = engine_config(path, len(gpus), max_tokens)
    arguments = server_arguments(config, 0) | ({"load_format": "dummy"} if dummy else {})
    command = [sys.executable, "-m", "miles.backends.sglang_utils.launch_engine", "127.0.0.1"]
    command += [json.dumps({"http": http, "nccl": nccl}), json.dumps(arguments)]
    devices = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")).split(",")
    added = engine_environment(
        config["device"], index=0, tp_size=len(gpus), colocate=True, inherited=os.environ, device_ids=devices
    )
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

    path, device = model(results.out, "0.6B"), torch.device("cuda", 0)
    began = time.monotonic()
    with MemoryWatch() as watch:
        async with engine(results.out, path, "ipc") as client:
            results.add("engine start", time.monotonic() - began, "s")
            answer = await client.generate([1, 2, 3], {"max_new_tokens": 8, "temperature": 1.0})
            results.add("tokens of a first answer", len(answer["output_ids"]))
            first, _ = await client.checksums()
            target = EngineTarget(client.name, client.url, "", 1, 1, has_bracket=False)
            version = 1
            for in_one in (False, True):
                weights, buffer = random_weights(path, device, in_one=in_one)
                copying = copy_seconds(num_bytes_of(weights))
                name = "one copy of the same bytes within the GPU"
                results.add(name, copying * 1e3, "ms", f"{num_bytes_of(weights)} bytes, {len(weights)} tensors")
                for bucket in BUCKETS[1:] if in_one else BUCKETS:
                    update = WeightUpdate(version, (target,), "tensor", bucket)
                    how, version = await measured(results, update, weights, buffer, copying)
                    results.add(f"GPU in use after {how}", watch.samples[-1].used / 1e9, "GB")
                held = await compare(results, client, path, weights, version)
                results.add(f"version {version}: it differs from the first weights'", str(held != first))
                del weights, buffer
                torch.cuda.empty_cache()
            await _hand_over(results, client, watch)


async def measured(
    results: Results, first: WeightUpdate, weights: Weights, buffer: Any, copying: float
) -> tuple[str, int]:
    """Updates from ``first`` on, beside a copy that takes ``copying`` seconds. Returns how, and the next version."""
    updates = Updates(first, weights[0][1].device)
    found = await asyncio.to_thread(updates.repeat, weights, _views(weights, buffer))
    updates.close()
    how = f"buckets of {first.bucket_bytes >> 20} MiB, {'tensors apart' if buffer is None else 'one buffer'}"
    tell(results, f"update, {how}", found, copying, "the copy")
    return how, updates.version


def _views(weights: Weights, buffer: Any) -> list[Any]:
    """Parameters that stay where they are: those that are views of one buffer."""
    return [] if buffer is None else [tensor for _, tensor in weights]


async def compare(results: Results, client: EngineClient, path: Path, weights: Weights, version: int) -> str:
    """As ``compare_with``, with an export of these weights."""
    export = export_of(results.out / f"export-{results.stage}", path, weights)
    return await compare_with(results, client, export, version)


async def compare_with(results: Results, client: EngineClient, export: Path, version: int, prefix: str = "") -> str:
    """The engine holds what it holds when it has loaded these weights from disk. Returns its checksum. Raises
    RuntimeError if it does not."""
    held, _ = await client.checksums()
    await client.update_weights_from_disk(str(export), version=version + 1)
    loaded, _ = await client.checksums()
    name = f"{prefix}version {version}: checksum equals that of loading from disk"
    results.add(name, str(held == loaded), note=held[:16])
    if held != loaded:
        raise RuntimeError(f"the engine holds {held[:16]} after version {version}, and {loaded[:16]} loaded from disk")
    return held


def ipc_large(results: Results) -> None:
    """The same with eight billion parameters, that an engine starts with at random."""
    asyncio.run(_ipc_large(results))


async def _ipc_large(results: Results) -> None:
    import torch

    path, device = config_only(results.out, "8B"), torch.device("cuda", 0)
    async with engine(results.out, path, "ipc-large", dummy=True) as client:
        target, version = EngineTarget(client.name, client.url, "", 1, 1, has_bracket=False), 1
        for in_one in (True, False):
            weights, buffer = random_weights(path, device, in_one=in_one)
            copying = copy_seconds(num_bytes_of(weights), repeats=8)
            name = "one copy of the same bytes within the GPU"
            results.add(name, copying * 1e3, "ms", f"{num_bytes_of(weights)} bytes, {len(weights)} tensors")
            for bucket in BUCKETS[1:]:
                update = WeightUpdate(version, (target,), "tensor", bucket)
                _, version = await measured(results, update, weights, buffer, copying)
            del weights, buffer
            torch.cuda.empty_cache()


def export_of(export: Path, path: Path, weights: Sequence[tuple[str, Any]]) -> Path:
    """A Hugging Face directory with these weights and everything else of ``path``."""
    from safetensors.torch import save_file

    export.mkdir(exist_ok=True)
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, export)
    save_file({name: tensor.cpu() for name, tensor in weights}, export / "model.safetensors", metadata={"format": "pt"})
    return export


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
