"""Checkpoints in megatron.core's torch_dist format: weights, optimizer, schedule, generators, and the rollout's id.

Collective: all ranks save, and load, together. What is loaded continues bit for bit where it was saved, on as many
ranks; with other parallel sizes all but the generators is taken over, too.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from miles.backends.base import ParallelState
from miles.backends.checkpoint_layout import DamagedCheckpoint
from miles.backends.megatron_utils.checkpoint_files import check_complete
from miles.backends.megatron_utils.errors import CannotWriteCheckpoint, CheckpointMismatch
from miles.backends.megatron_utils.families import Shape

logger = logging.getLogger(__name__)

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_SPARE = 1 << 20
"""Bytes beside tensors that a checkpoint takes, at most about."""


@dataclass
class TrainState:
    """What a checkpoint holds. ``optimizer`` and ``scheduler``: None where only weights matter. ``without_head``: of a
    critic that takes over a language model's layers, whose output layer is not its own. ``is_adapter``: ``model`` is
    the adapters of one, without the weights below."""

    shape: Shape
    parallel: ParallelState
    model: Any
    optimizer: Any = None
    scheduler: Any = None
    without_head: bool = False
    is_adapter: bool = False


@dataclass(frozen=True)
class LoadedState:
    """What was taken from a checkpoint."""

    rollout_id: int | None
    optimizer: bool
    generators: bool


def save_checkpoint(directory: Path, state: TrainState, *, rollout_id: int | None, generators: bool = True) -> None:
    """Fill ``directory``, which is there and empty.

    Raises:
        CannotWriteCheckpoint: The disk is full, or forbids it. The directory may hold a part then.
    """
    tree = _tree(state, loading=False, generators=generators)
    tree |= {
        "rollout_id": rollout_id,
        "iteration": -1 if rollout_id is None else rollout_id,
        "checkpoint_version": 3.0,
        "shape": asdict(state.shape),
        "optimizer_kind": _kind(state.optimizer),
        "is_adapter": state.is_adapter,
        "world_size": state.parallel.world_size,
        **_sizes(state.parallel),
    }
    _check_space(directory, tree)
    try:
        dist_checkpointing.save(tree, str(directory), content_metadata=dict(_METADATA))
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _cannot_write(directory, f"{type(error).__name__}: {error}") from error


def load_checkpoint(directory: Path, state: TrainState, *, generators: bool = True) -> LoadedState:
    """Take over weights, and what else ``state`` names.

    Raises:
        DamagedCheckpoint: Files are missing or cannot be read.
        CheckpointMismatch: It is of another model, or has no (or another) optimizer's state.
    """
    index = check_complete(directory)
    common = _load_common(directory)
    _check_fit(directory, common, index, state)
    sizes = _sizes(state.parallel)
    same_ranks = common.get("world_size") == state.parallel.world_size and all(
        common.get(name, 1) == size for name, size in sizes.items()
    )
    generators = generators and same_ranks and any(key.startswith("rng_state/") for key in index.state_dict_metadata)
    tree = _tree(state, loading=True, generators=generators)
    try:
        loaded = dist_checkpointing.load(tree, str(directory))
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException, CheckpointingException) as error:
        raise DamagedCheckpoint(
            f"the checkpoint {directory} cannot be read",
            evidence=f"{type(error).__name__}: {error}",
            advice="Load an earlier one with --ckpt-step, or restore the files.",
            path=str(directory),
        ) from error
    state.model.load_state_dict(loaded["model"], strict=not state.without_head)
    if state.optimizer is not None:
        state.optimizer.load_state_dict(loaded["optimizer"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(common["opt_param_scheduler"])
    if generators:
        _set_generators(loaded["rng_state"])
    return LoadedState(common.get("rollout_id"), state.optimizer is not None, generators)


def _tree(state: TrainState, *, loading: bool, generators: bool) -> dict[str, Any]:
    """megatron.core's sharded state dict of all that is saved or loaded."""
    model = state.model.sharded_state_dict(metadata=dict(_METADATA))
    if state.without_head:
        model = {name: value for name, value in model.items() if not name.startswith("output_layer.")}
    tree: dict[str, Any] = {"model": model}
    if state.optimizer is not None:
        tree["optimizer"] = state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA))
    if state.scheduler is not None and not loading:
        tree["opt_param_scheduler"] = state.scheduler.state_dict()
    if generators:
        # Each rank has its own: no replica is like another.
        parallel = state.parallel
        tree["rng_state"] = ShardedObject(
            "rng_state", None if loading else _generators(), (parallel.world_size,), (parallel.rank,), replica_id=0
        )
    return tree


def _sizes(parallel: ParallelState) -> dict[str, int]:
    """How the model is spread over ranks."""
    names = ("tp_size", "pp_size", "cp_size", "ep_size", "etp_size")
    return {name: getattr(parallel, name) for name in names}


def _kind(optimizer: Any) -> str | None:
    if optimizer is None:
        return None
    return str(optimizer.config.optimizer)


# Random generators


def _generators() -> dict[str, Any]:
    """States as plain values and tensors, so that reading them runs no code."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # the global one
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# Checks


def _check_space(directory: Path, tree: dict[str, Any]) -> None:
    """All ranks fail together before a byte is written: one that fails alone leaves the others in a collective."""
    own = sum(_bytes(value) for value in nested_values(tree))
    sizes = torch.tensor([own, shutil.disk_usage(directory).free], dtype=torch.int64)
    needed, free = sizes[:1].clone(), sizes[1:].clone()
    device = _collective_device()
    needed, free = needed.to(device), free.to(device)
    dist.all_reduce(needed)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if needed.item() + _SPARE > free.item():
        raise _cannot_write(
            directory, f"it takes about {needed.item() + _SPARE:,} bytes, and {free.item():,} are free on the disk"
        )


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _bytes(value: object) -> int:
    """Of what this rank writes of it: of replicas, one writes."""
    if not isinstance(value, ShardedTensor | ShardedTensorFactory) or value.data is None:
        return 0
    replica = value.replica_id
    first = not any(replica) if isinstance(replica, tuple) else replica == 0
    return int(value.data.nbytes) if first else 0


def _load_common(directory: Path) -> dict[str, Any]:
    try:
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(directory))
    except Exception as error:  # a damaged archive raises anything
        raise DamagedCheckpoint(
            f"the checkpoint {directory} cannot be read",
            evidence=f"common.pt: {type(error).__name__}: {error}",
            advice="Load an earlier one with --ckpt-step, or restore the files.",
            path=str(directory),
        ) from error
    return common


def _check_fit(directory: Path, common: dict[str, Any], index: Metadata, state: TrainState) -> None:
    wanted, found = asdict(state.shape), common.get("shape")
    if found is not None and state.without_head:
        wanted = {**wanted, "tied": found.get("tied")}
    if found is not None and not state.shape.mtp_layers:
        # What this model leaves out (``--mtp-num-layers``) may well be there.
        wanted = {**wanted, "mtp_layers": found.get("mtp_layers")}
    if found is not None and found != wanted:
        different = [
            f"{key}: {found.get(key)} there, {wanted[key]} wanted" for key in wanted if found.get(key) != wanted[key]
        ]
        raise CheckpointMismatch(
            f"the checkpoint {directory} is of another model",
            evidence="; ".join(different),
            advice="Load a checkpoint of the model that --hf-checkpoint describes.",
            path=str(directory),
        )
    if bool(common.get("is_adapter")) != state.is_adapter:
        holds, asks = (
            ("an adapter alone", "whole weights are")
            if common.get("is_adapter")
            else ("whole weights", "an adapter is")
        )
        raise CheckpointMismatch(
            f"the checkpoint {directory} holds {holds}, and {asks} asked for",
            evidence="it was saved with --lora-rank"
            if common.get("is_adapter")
            else "it was saved without --lora-rank",
            advice="Give --lora-rank as it was saved; make whole weights of an adapter with `miles convert`; or begin "
            "an adapter on these weights with --finetune.",
            path=str(directory),
        )
    if state.optimizer is None:
        return
    _check_experts(directory, common, state)
    kind, wanted_kind = common.get("optimizer_kind"), _kind(state.optimizer)
    if kind != wanted_kind or not any(key.startswith("optimizer.") for key in index.state_dict_metadata):
        raise CheckpointMismatch(
            f"the checkpoint {directory} has no state of the optimizer {wanted_kind}",
            evidence=f"it holds that of: {kind or 'none; it may have been saved with --no-save-optim'}",
            advice="Pass --no-load-optim to begin with a fresh optimizer.",
            path=str(directory),
        )


def _check_experts(directory: Path, common: dict[str, Any], state: TrainState) -> None:
    """megatron.core has one optimizer for a model whose experts are all on each rank, and two where they are spread."""
    before, now = int(common.get("ep_size", 1)), state.parallel.ep_size
    if state.shape.experts is None or (before == 1) == (now == 1):
        return
    raise CheckpointMismatch(
        f"the optimizer's state in {directory} cannot be loaded with --expert-model-parallel-size {now}",
        evidence=f"it was saved with --expert-model-parallel-size {before}; between 1 and more, megatron.core cannot",
        advice="Keep the size (from 2 on any other will do), or pass --no-load-optim to take over weights alone.",
        path=str(directory),
    )


def _cannot_write(directory: Path, evidence: str) -> CannotWriteCheckpoint:
    return CannotWriteCheckpoint(
        f"the checkpoint {directory} could not be written",
        evidence=evidence,
        advice="Make room on the disk, or choose another one with --save; what was saved before is untouched.",
        path=str(directory),
    )


# Writing


def _write_here(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """In place of megatron.core's writer processes: a rank has threads, of which a fork would copy only the locks."""
    written: dict[int, Any] | Exception = {}
    for i, bucket in enumerate(buckets):
        answer: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[Any] = queue.Queue()
        running.put(i)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, i, bucket, answer, running, use_fsync=True, use_msc=use_msc
        )
        _, result = answer.get_nowait()
        if isinstance(result, Exception):
            written = _reason(bucket[0], result)
            break
        assert isinstance(written, dict)
        written[i] = result
    logger.debug("rank %d wrote %d files", rank, len(buckets))
    results.put(written)


def _reason(path: str, error: Exception) -> Exception:
    """The system's, where it is the disk: torch's archive writer only tells that its position is not the expected."""
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(bytes(_SPARE))
            os.fsync(file.fileno())
    except OSError as told:
        return told
    return error


FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_here)
