"""What a rank writes for a person to look at: its train data, checksums of its weights."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from miles.backends.base import ParallelState
from miles.backends.training_utils.data import RankData


def dump_train_data(args: Any, rollout_id: int, data: RankData, parallel: ParallelState) -> None:
    """``--save-debug-train-data``, a template with ``{rollout_id}`` and ``{rank}``: one file of ``torch.save`` with
    ``rollout_id``, ``rank``, ``rollout_data``, ``cp_rank``, ``cp_size`` and ``qkv_format``."""
    template = getattr(args, "save_debug_train_data", None)
    if not template:
        return
    path = Path(template.format(rollout_id=rollout_id, rank=parallel.rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "rollout_id": rollout_id,
        "rank": parallel.rank,
        "rollout_data": data.as_dict(),
        "cp_rank": parallel.cp_rank,
        "cp_size": parallel.cp_size,
        "qkv_format": getattr(args, "qkv_format", None) or "thd",
    }
    torch.save(content, path)


def write_checksums(args: Any, rollout_id: int, rank: int, models: Iterable[torch.nn.Module]) -> None:
    """``--save-local-weight-checksum``: a line of JSON with the SHA-256 of each parameter's part on this rank, in
    ``weight_checksums/rank00000.jsonl`` in the run's directory."""
    if not getattr(args, "save_local_weight_checksum", False):
        return
    path = Path(args.run_dir) / "weight_checksums" / f"rank{rank:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = {name: _sha256(parameter) for model in models for name, parameter in model.named_parameters()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"rollout_id": rollout_id, "rank": rank, "sha256": sums}) + "\n")


def _sha256(parameter: torch.Tensor) -> str:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    whole = local.detach().cpu().contiguous()
    # Not through numpy: a storage that numpy has seen does not change its size again, and a sleep must.
    buffer = (ctypes.c_ubyte * whole.nbytes).from_address(whole.data_ptr()) if whole.nbytes else b""
    return hashlib.sha256(buffer).hexdigest()
