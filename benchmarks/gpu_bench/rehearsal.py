"""A rehearsal: every stage on a CPU, with a tiny model and ranks instead of GPUs, so that no slip fails one on a GPU.

Numbers of a rehearsal mean nothing. What NVML would say is not measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "MILES_GPU_BENCH_REHEARSAL"
NOT_MEASURED = "not measured"

_ON_GPU = (
    "--sglang-attention-backend", "triton", "--sglang-sampling-backend", "pytorch", "--sglang-grammar-backend", "none",
    "--sglang-mem-fraction-static", "0.7",
)  # fmt: skip


def is_rehearsal(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process belongs to one."""
    return environ.get(VARIABLE) == "1"


def shape(name: str) -> str:
    """The model's shape to use instead of ``name``, see ``gpu_bench.model.SHAPES``."""
    if not is_rehearsal():
        return name
    return "tiny-moe" if "moe" in name else "tiny"


def sizes() -> tuple[int, int, int]:
    """Prompts of a rollout, answers to each, tokens of an answer."""
    return (4, 4, 16) if is_rehearsal() else (16, 8, 256)


def run_flags(backend: str) -> tuple[str, ...]:
    """Device, attention and engines."""
    if is_rehearsal():
        return ("--device", "cpu", "--sglang-max-total-tokens", "4096")
    return ("--device", "cuda", *(("--attn-implementation", "sdpa") if backend == "fsdp" else ()), *_ON_GPU)


def max_tokens() -> int:
    """Of a micro-batch, for each GPU."""
    return 128 if is_rehearsal() else 4096
