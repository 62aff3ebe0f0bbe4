"""Whether ranks that use CUDA may be forked from a process that has everything imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from gpu_bench.results import Results

PROGRAM = """
import json, os, sys, time
began = time.perf_counter()
from miles_agents.worker.zygote_safety import Holdings, why_unsafe
before = Holdings.now()
import torch
if sys.argv[1] == "backend":
    import miles.backends.megatron_utils.preload
imported = time.perf_counter() - began
why = why_unsafe(before)
def child():
    began = time.perf_counter()
    try:
        a = torch.ones(512, 512, device="cuda")
        told = {"sum": float((a @ a).sum())}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return told | {"seconds": time.perf_counter() - began}
readers = []
for _ in range(2):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(child()).encode())
        os._exit(0)
    os.close(writer)
    readers.append(reader)
answers = [json.loads(b"".join(iter(lambda: os.read(reader, 4096), b""))) for reader in readers]
print(json.dumps({"imported": imported, "why_unsafe": why, "children": answers}))
"""
EXPECTED = 512.0**3
CASES = (("torch", "0"), ("torch", "1"), ("backend", "0"), ("backend", "1"))


def zygote(results: Results) -> None:
    """Forks that use CUDA, with and without torch's check for GPUs being made through NVML."""
    for what, by_nvml in CASES:
        env = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": by_nvml, "OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, what], env=env, capture_output=True, text=True, timeout=100, check=False
        )
        name = f"{what} imported, PYTORCH_NVML_BASED_CUDA_CHECK={by_nvml}"
        if done.returncode:
            results.add(
                name, "failed", note=done.stderr.splitlines()[-1] if done.stderr else f"exit code {done.returncode}"
            )
            continue
        told = json.loads(done.stdout.splitlines()[-1])
        results.add(
            name,
            verdict(told),
            note=f"imports {told['imported']:.2f} s, all {time.perf_counter() - began:.2f} s; {told}"[:400],
        )


def verdict(told: dict[str, object]) -> str:
    """In words. ``told``: what the program said."""
    children = told["children"]
    assert isinstance(children, list)
    wrong = [str(child.get("error", "a wrong sum")) for child in children if child.get("sum") != EXPECTED]
    if wrong:
        return f"a fork cannot use CUDA: {wrong[0]}"
    return f"forks use CUDA; the check says: {told['why_unsafe'] or 'safe'}"
