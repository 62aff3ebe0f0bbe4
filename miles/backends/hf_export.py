"""Writing a backend's weights as an ordinary Hugging Face directory.

Written aside as ``.{name}.tmp`` and renamed when complete; an earlier export has the name until then. The file
``.complete`` inside says so to whoever copies it.
"""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from miles.backends.checkpoint_layout import EXPORTED
from miles.backends.hf_directory import INDEX, SINGLE
from miles.backends.training_utils.collectives import all_gather_text
from miles.utils.replace_directory import put_in_place, recover
from miles_agents.errors import ConfigError, EnvironmentFault

MAX_SHARD_BYTES = 5 * 10**9
"""Of a weight file; as much is held in memory while it is gathered."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class CannotExport(EnvironmentFault):
    """A Hugging Face directory could not be written."""

    code = "E-MODEL-002"


class ExportExists(ConfigError):
    """Where a Hugging Face directory is to be written there is something that we did not write."""

    code = "E-MODEL-003"


class Weights(Protocol):
    """What of a backend an export needs: see ``TrainBackend``."""

    device: torch.device

    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and full tensors; every rank exhausts it."""


def export_hf(backend: Weights, args: Namespace, path: Path) -> None:
    """Collective over all ranks; rank 0 writes. An earlier export of ours at ``path`` gives way.

    Config, tokenizer and whatever else is no weights come from ``args.hf_checkpoint``.

    Raises:
        CannotExport: On all ranks. Nothing has changed at ``path``.
        ExportExists: On all ranks.
    """
    writer = _DirectoryWriter(path, Path(args.hf_checkpoint)) if dist.get_rank() == 0 else None
    for name, tensor in backend.hf_weights(only_first=True):
        # The other ranks go on handing on weights whatever happens here.
        if writer is not None:
            writer.add(name, tensor)
    failure = writer.finish() if writer is not None else ""
    _raise_on_all(failure, path, backend.device)


def _raise_on_all(failure: str, path: Path, device: torch.device) -> None:
    told = next(filter(None, all_gather_text(failure, device)), "")
    if not told:
        return
    if told.startswith(_EXISTS):
        raise ExportExists(
            f"there is something at {path} already",
            evidence=told.removeprefix(_EXISTS),
            advice="Choose another path, or remove what is there.",
            path=str(path),
        )
    raise CannotExport(
        f"the Hugging Face directory {path} could not be written",
        evidence=told,
        advice="Make room on the disk, or choose another path.",
        path=str(path),
    )


_EXISTS = "exists: "


class _DirectoryWriter:
    """Takes tensors one by one, and writes a file whenever there are enough. A failure is kept until the end."""

    def __init__(self, path: Path, origin: Path) -> None:
        self._path = path
        self._aside = path.parent / f".{path.name}.tmp"
        self._origin = origin
        self._failure = ""
        self._waiting: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0
        self._dtype = torch.float32
        self._try(self._begin)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The tensor may change as soon as this returns."""
        if self._failure:
            return
        self._dtype = tensor.dtype
        waiting = sum(other.nbytes for other in self._waiting.values())
        if self._waiting and waiting + tensor.nbytes > MAX_SHARD_BYTES:
            self._try(self._write_shard)
        self._waiting[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._total += tensor.nbytes

    def finish(self) -> str:
        """Complete and rename. Returns why that failed, or ""."""
        for step in (self._write_shard, self._name_shards, self._copy_rest, self._commit):
            self._try(step)
        if self._failure and not self._failure.startswith(_EXISTS):
            shutil.rmtree(self._aside, ignore_errors=True)
        return self._failure

    def _try(self, step: Callable[[], None]) -> None:
        if self._failure:
            return
        try:
            step()
        except (OSError, ValueError, SafetensorError) as error:
            self._failure = f"{type(error).__name__}: {error}"

    def _begin(self) -> None:
        recover(self._path)
        if self._path.exists() and not (self._path / EXPORTED).is_file() and not _is_empty(self._path):
            self._failure = f"{_EXISTS}it has no {EXPORTED} file, so it is no export of ours"
            return
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)

    def _write_shard(self) -> None:
        save_file(self._waiting, self._aside / f"shard-{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting = {}

    def _name_shards(self) -> None:
        count = len(self._files)
        if count == 1:
            (self._aside / "shard-0").rename(self._aside / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._files):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self._aside / f"shard-{i}").rename(self._aside / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._aside / INDEX).write_text(json.dumps(index, indent=2))

    def _copy_rest(self) -> None:
        for file in sorted(self._origin.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != EXPORTED:
                shutil.copyfile(file, self._aside / file.name)
        config = json.loads((self._origin / "config.json").read_text())
        written = str(self._dtype).removeprefix("torch.")
        config |= {key: written for key in ("torch_dtype", "dtype") if key in config}
        (self._aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _commit(self) -> None:
        _sync(self._aside.iterdir())
        (self._aside / EXPORTED).touch()
        _sync([self._aside])
        replaced = put_in_place(self._aside, self._path)
        _sync([self._path.parent])
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
