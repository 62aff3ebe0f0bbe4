"""The environment of an engine's process. Pure; each value gives way to one that the user's own environment has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

STAND_INS = Path(__file__).parent / "cpu_stand_ins"
"""Import-only ``triton``, ``torchvision`` and ``sgl_kernel``. For an engine on a CPU and for nobody else."""

_ALWAYS = {
    "HF_HUB_OFFLINE": "1",  # a model is a directory; nothing is fetched behind the user's back
    "NVSHMEM_DISABLE_NCCL": "1",
    "NCCL_CUMEM_ENABLE": "0",  # the trainer's ranks have it, too: see ``training.parts.trainer_env``
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "false",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
    "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true",
    "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_FALLBACK_VARIANT": "true",
    # With it /health generates a token, and so hangs for as long as generation is paused.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "false",
    # Of 5 s by default: after a longer training step the router would send into connections that the engine has closed.
    "SGLANG_TIMEOUT_KEEP_ALIVE": "86400",
}
_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",  # more threads than free cores cost a factor of ten
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCHDYNAMO_DISABLE": "1",  # what SGLang compiles would need a C++ compiler here, and triton
    "PYTHONWARNINGS": "ignore",  # SGLang warns of every kind of GPU that it does not find
}


def engine_environment(
    device: str,
    *,
    index: int,
    tp_size: int,
    colocate: bool,
    inherited: Mapping[str, str],
    device_ids: Sequence[str] = (),
    num_cores: int | None = None,
    is_alone: bool = True,
) -> dict[str, str]:
    """What to add to the environment of engine ``index``.

    Args:
        device: "cpu" or "cuda".
        inherited: The user's environment: what it sets of these stays as it is, but for the choice of devices.
        device_ids: CUDA only: indices or UUIDs of the engine's GPUs, in the order of its ranks.
        num_cores: CPU only: cores to bind ranks to; default: those of this machine.
        is_alone: All of the run is on one machine. Else its agent names the interface for process groups.
    """
    wanted = {**_ALWAYS, "SGLANG_DG_CACHE_DIR": f"/tmp/sglang_deep_gemm/regular_rank_{index}"}  # noqa: S108
    wanted["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] = "0" if colocate and tp_size > 1 else "1"
    if device == "cpu":
        wanted |= _CPU
        if not is_alone:
            del wanted["GLOO_SOCKET_IFNAME"]
        if tp_size > 1:
            wanted["SGLANG_CPU_OMP_THREADS_BIND"] = _core_lists(tp_size, index, num_cores or os.cpu_count() or 1)
    env = {name: value for name, value in wanted.items() if name not in inherited}
    if device == "cpu":
        env["OMP_NUM_THREADS"] = wanted["OMP_NUM_THREADS"]
    elif device_ids:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(device_ids)
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # that of the indices; CUDA's own would be the fastest GPU first
    return env


def stand_ins_first(environ: Mapping[str, str]) -> dict[str, str]:
    """``PYTHONPATH`` with the stand-ins in front, for an engine on a CPU; nothing on a GPU."""
    if environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return {}
    rest = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(STAND_INS)]
    return {"PYTHONPATH": os.pathsep.join([str(STAND_INS), *rest])}


def _core_lists(tp_size: int, index: int, num_cores: int) -> str:
    """One core for each rank, such as ``0|1``; ranks share cores where there are not enough."""
    return "|".join(str((index * tp_size + rank) % num_cores) for rank in range(tp_size))
