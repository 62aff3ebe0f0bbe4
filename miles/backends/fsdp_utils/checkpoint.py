"""This backend's checkpoints: torch.distributed.checkpoint for what is sharded, plain files for the rest.

``iter_0000007/model/`` and ``optimizer/`` hold shards with their names and places, so that any number of ranks can
load them; ``rng_00000.safetensors`` each rank's generators; ``meta.json`` counters. The directory above has
``latest_checkpointed_iteration.txt``, which the trainer writes last.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from miles.backends.checkpoint_layout import FSDP_META, TRACKER, holds_adapter, iteration_name
from miles.backends.fsdp_utils.errors import BadFsdpCheckpoint
from miles.backends.fsdp_utils.optimizer import ShardedOptimizer
from miles.backends.fsdp_utils.shards import base_shards, is_part_of_adapter, named_shards, saved_shards
from miles.utils.replace_directory import recover_all

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Attributes:
    rollout_id: That after which the checkpoint was made.
    steps: Optimizer steps done.
    schedule: Of the run that made it.
    """

    rollout_id: int
    steps: int
    schedule: dict[str, Any]
    world_size: int


@dataclass(frozen=True)
class RankState:
    """A rank's random number generators: Python's and numpy's as JSON, torch's as bytes."""

    python: str
    numpy: str
    torch: dict[str, torch.Tensor]

    @classmethod
    def now(cls) -> RankState:
        """Of this process."""
        name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return cls(json.dumps(random.getstate()), json.dumps([name, keys.tolist(), *rest]), states)

    def save(self, path: Path) -> None:
        """Into one file."""
        save_file(self.torch, path, metadata={"python": self.python, "numpy": self.numpy})

    @classmethod
    def load(cls, path: Path) -> RankState:
        """From a file of ``save``."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return cls(metadata["python"], metadata["numpy"], load_file(path))

    def restore(self) -> None:
        """Make this process's generators go on from here."""
        version, state, gauss = json.loads(self.python)
        random.setstate((version, tuple(state), gauss))
        name, keys, *rest = json.loads(self.numpy)
        np.random.set_state((name, np.array(keys, np.uint32), *rest))
        torch.set_rng_state(self.torch["cpu"])
        if "cuda" in self.torch and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.torch["cuda"])


def is_checkpoint(root: Path, step: int | None = None) -> bool:
    """Whether ``root`` is a place where this backend has saved, or one checkpoint of such a place; with ``step``, also
    one without a tracker file that has the checkpoint of that rollout."""
    if step is None and (root / FSDP_META).is_file():
        return True
    recover_all(root, "iter_*")
    if step is not None and (root / iteration_name(step) / FSDP_META).is_file():
        return True
    tracker = root / TRACKER
    if not tracker.is_file():
        return False
    iteration = tracker.read_text().strip()
    return iteration.isdecimal() and (root / iteration_name(int(iteration)) / FSDP_META).is_file()


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: ShardedOptimizer | None,
    rng: RankState | None,
    progress: Progress,
) -> None:
    """Write everything into ``directory``, which is new and empty. Collective."""
    state_dict_saver.save(saved_shards(model), checkpoint_id=directory / "model")
    if optimizer is not None:
        state_dict_saver.save(_optimizer_state(optimizer), checkpoint_id=directory / "optimizer")
    if rng is not None:
        rng.save(directory / f"rng_{dist.get_rank():05d}.safetensors")
    if dist.get_rank() == 0:
        (directory / FSDP_META).write_text(json.dumps({"format": FORMAT, **asdict(progress)}, indent=2))


def load_checkpoint(
    root: Path,
    model: nn.Module,
    optimizer: ShardedOptimizer | None,
    *,
    step: int | None,
    rng: bool,
    below: bool = False,
) -> Progress:
    """Fill model and optimizer from ``root``'s newest checkpoint, or from that of rollout ``step``. Collective.

    Of a model with adapters these are filled; with ``below`` all else.

    Raises:
        BadFsdpCheckpoint: It is not there, not whole, or of another model.
    """
    directory = checkpoint_directory(root, step)
    progress = _progress(directory)
    shards = dict(base_shards(model)) if below else saved_shards(model)
    _check_kind(directory, is_adapter=any(map(is_part_of_adapter, shards)))
    _read(shards, directory / "model", "--load")
    if optimizer is not None:
        optimizer.set_steps(progress.steps)
        _read(_optimizer_state(optimizer), directory / "optimizer", "--no-load-optim")
    if rng:
        _restore_rng(directory, progress)
    return progress


def save_weights(directory: Path, model: nn.Module) -> None:
    """Another model's weights, into a directory of their own. Collective."""
    state_dict_saver.save(dict(named_shards(model)), checkpoint_id=directory)


def load_weights(directory: Path, model: nn.Module) -> None:
    """Those of ``save_weights``. Collective.

    Raises:
        BadFsdpCheckpoint: They are not whole, or of another model.
    """
    _read(dict(named_shards(model)), directory, "--load")


def weights_beside(root: Path, step: int | None, name: str) -> Path | None:
    """Where the checkpoint that ``load_checkpoint`` would read has such weights. None: there are none."""
    if not is_checkpoint(root, step):
        return None
    directory = checkpoint_directory(root, step) / name
    return directory if directory.is_dir() else None


def _check_kind(directory: Path, *, is_adapter: bool) -> None:
    if holds_adapter(directory) == is_adapter:
        return
    holds, asked = ("whole weights", "an adapter is") if is_adapter else ("an adapter alone", "whole weights are")
    raise _bad(
        f"{directory} holds {holds}, and {asked} asked for",
        f"it was saved with{'out' if is_adapter else ''} --lora-rank",
        "Give --lora-rank as it was saved; make whole weights of an adapter with `miles convert`; or begin an adapter "
        "on these weights with --finetune.",
    )


def _optimizer_state(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """States as parts of wholes, with the places of the parameters that they belong to."""
    return {
        f"{shard.name}.{name}": _part(local, shard.parameter)
        for shard in optimizer.shards
        for name, local in optimizer.state(shard).items()
    }


def _part(local: torch.Tensor, like: DTensor) -> DTensor:
    """Not by ``DTensor.from_local``: it would copy what is kept on the host to the mesh's device."""
    return DTensor(local, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def weights_directory(root: Path, step: int | None) -> Path:
    """Of the checkpoint that ``root`` and ``step`` stand for; ``root`` itself if it is a Hugging Face directory."""
    return checkpoint_directory(root, step) if is_checkpoint(root, step) else root


def checkpoint_directory(root: Path, step: int | None) -> Path:
    """Of ``root``'s newest checkpoint, or of that of rollout ``step``; ``root`` itself if it is one.

    Raises:
        BadFsdpCheckpoint: It is not there.
    """
    if step is None and (root / FSDP_META).is_file():
        return root
    if step is None:
        step = int((root / TRACKER).read_text())
    directory = root / iteration_name(step)
    if not (directory / FSDP_META).is_file():
        there = ", ".join(sorted(path.name for path in root.glob("iter_*"))) or "nothing"
        raise _bad(f"{root} has no checkpoint of rollout {step}", f"there is: {there}", "Give another --ckpt-step.")
    return directory


def _progress(directory: Path) -> Progress:
    try:
        meta = json.loads((directory / FSDP_META).read_text())
        if meta.pop("format") != FORMAT:
            raise ValueError("it was written by a newer version")
        return Progress(**meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _bad(f"{directory / FSDP_META} cannot be read", str(error), "Load another checkpoint.") from error


def _read(state: dict[str, Any], directory: Path, flag: str) -> None:
    if not directory.is_dir():
        raise _bad(
            f"{directory.parent} holds no {directory.name} state",
            "it was saved with --no-save-optim" if directory.name == "optimizer" else "the directory is not whole",
            f"Give {flag}, or load another checkpoint.",
        )
    try:
        state_dict_loader.load(state, checkpoint_id=directory)
    except (CheckpointException, ValueError, RuntimeError, OSError) as error:
        raise _bad(
            f"{directory} does not fit this model, or is not whole",
            str(error).strip()[:2000],
            "Load a checkpoint that was made with this --hf-checkpoint.",
        ) from error


def _restore_rng(directory: Path, progress: Progress) -> None:
    """Ranks that were not there go on with the seed they started with."""
    rank = dist.get_rank()
    path = directory / f"rng_{rank:05d}.safetensors"
    if not path.is_file():
        if rank < progress.world_size:
            raise _bad(f"{directory} holds no RNG state of rank {rank}", "no such file", "Give --no-load-rng.")
        return
    try:
        RankState.load(path).restore()
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _bad(f"{path} cannot be read", str(error), "Give --no-load-rng.") from error


def _bad(what: str, evidence: str, advice: str) -> BadFsdpCheckpoint:
    return BadFsdpCheckpoint(what, evidence=evidence, advice=advice)
