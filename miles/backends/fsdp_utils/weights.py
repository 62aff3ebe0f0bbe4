"""Weights between safetensors files of a Hugging Face directory and shards. Each rank reads its own rows only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from miles.backends.fsdp_utils.errors import BadModelDirectory
from miles.backends.fsdp_utils.model import named_shards

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_hf_weights(model: nn.Module, directory: Path) -> None:
    """Fill all shards from the files of ``directory``, converting dtypes.

    Raises:
        BadModelDirectory: A file, a weight or a shape is not as the configuration says.
    """
    shards = dict(named_shards(model))
    files = weight_files(directory)
    missing = sorted(set(shards) - set(files))
    if missing:
        raise _bad(directory, f"{len(missing)} weights are missing", ", ".join(missing[:5]))
    with ExitStack() as stack, torch.no_grad():
        opened: dict[Path, Any] = {}
        for name, shard in shards.items():
            path = files[name]
            if path not in opened:
                opened[path] = stack.enter_context(_open(path))
            _fill(shard, opened[path].get_slice(name), directory, name)


def weight_files(directory: Path) -> dict[str, Path]:
    """Which file holds which weight, by the index or, without one, the single file.

    Raises:
        BadModelDirectory: There is neither, or a file of the index is not there.
    """
    index = directory / INDEX
    if index.is_file():
        files = {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        gone = sorted({path.name for path in files.values() if not path.is_file()})
        if gone:
            raise _bad(directory, f"files of {INDEX} are missing", ", ".join(gone))
        return files
    single = directory / SINGLE
    if not single.is_file():
        raise _bad(directory, "no weights", f"there is neither {SINGLE} nor {INDEX}")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def full_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, on all ranks, in the order of the model. Collective: all ranks must exhaust it."""
    for name, shard in named_shards(model):
        with torch.no_grad():
            full = cast("DTensor", shard.detach().to(dtype)).full_tensor()
        yield name, full


def _fill(shard: DTensor, rows: Any, directory: Path, name: str) -> None:
    shape = tuple(rows.get_shape())
    if shape != tuple(shard.shape):
        raise _bad(directory, f"{name} has another shape than config.json says", f"{shape}, not {tuple(shard.shape)}")
    local = shard.to_local()
    start = first_row(shard)
    if local.numel():
        local.copy_(rows[start : start + local.shape[0]])


def first_row(shard: DTensor) -> int:
    """Where this rank's rows begin in the whole: FSDP2 cuts dimension 0 into equal parts, the last ones shorter."""
    mesh = shard.device_mesh
    rows = -(-shard.shape[0] // mesh.size())
    return min(rows * mesh.get_local_rank(), shard.shape[0])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _bad(path.parent, f"{path.name} cannot be read", str(error)) from error


def _bad(directory: Path, what: str, evidence: str) -> BadModelDirectory:
    return BadModelDirectory(
        f"{directory}: {what}",
        evidence=evidence,
        advice="Give a complete Hugging Face directory; compare it with where it was copied from.",
    )
