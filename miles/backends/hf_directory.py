"""Reading an ordinary Hugging Face model directory: ``config.json`` and safetensors files, one or several."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from miles_agents.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MTP_LAYERS = "model.mtp_layers."
"""What names of MiMo's layers that predict further tokens begin with: a run may leave these layers out."""


class UnreadableModelDirectory(ConfigError):
    """A model directory that is not there, or lacks something, or holds a file that cannot be read."""

    code = "E-MODEL-001"


class HFDirectory:
    """A directory whose files are known; weights are read on demand.

    Raises:
        UnreadableModelDirectory: See the class of that name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise _unreadable(self.path, "there is no such directory")
        self._files = self._find_files()

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return read_config(self.path)

    @contextlib.contextmanager
    def opened(self) -> Iterator[OpenedDirectory]:
        """For reading tensors. Files are opened when first needed."""
        with contextlib.ExitStack() as stack:
            yield OpenedDirectory(self.path, self._files, stack)

    def common_dtype(self) -> torch.dtype:
        """bfloat16 if all weights are; else float32, which holds any of them exactly."""
        with self.opened() as opened:
            dtypes = {opened.dtype(name) for name in self._files}
        return torch.bfloat16 if dtypes == {"BF16"} else torch.float32

    def _find_files(self) -> dict[str, str]:
        """Name of each tensor -> file."""
        if (self.path / INDEX).is_file():
            weight_map: dict[str, str] = _read_json(self.path / INDEX).get("weight_map", {})
            absent = sorted({file for file in weight_map.values() if not (self.path / file).is_file()})
            if absent or not weight_map:
                raise _unreadable(self.path, f"{INDEX} names files that are not there: {', '.join(absent) or 'none'}")
            return weight_map
        files = [SINGLE] if (self.path / SINGLE).is_file() else sorted(p.name for p in self.path.glob("*.safetensors"))
        if not files:
            there = sorted(entry.name for entry in self.path.iterdir())[:20]
            raise _unreadable(self.path, f"no *.safetensors file; there are: {', '.join(there) or 'no files at all'}")
        found: dict[str, str] = {}
        for file in files:
            with _open(self.path / file) as opened:
                found |= dict.fromkeys(opened.keys(), file)
        return found


class OpenedDirectory:
    """Tensors of a directory, mapped from its files."""

    def __init__(self, path: Path, files: Mapping[str, str], stack: contextlib.ExitStack) -> None:
        self._path = path
        self._files = files
        self._stack = stack
        self._opened: dict[str, Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """On the CPU, in the file's dtype. Read-only: it may be the file's memory."""
        try:
            tensor: torch.Tensor = self._of(name).get_tensor(name)
        except SafetensorError as error:
            raise _unreadable(self._path, f"{self._files[name]}: {name}: {error}") from error
        return tensor

    def dtype(self, name: str) -> str:
        """As safetensors spells it: ``F32``, ``BF16``, ..."""
        return str(self._of(name).get_slice(name).get_dtype())

    def _of(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = self._stack.enter_context(_open(self._path / file))
        return self._opened[file]


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        UnreadableModelDirectory: It is not there, or no JSON.
    """
    return _read_json(path / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise _unreadable(path.parent, f"no {path.name}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path.parent, f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise _unreadable(path.parent, f"{path.name} holds no JSON object")
    return value


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path.parent, f"{path.name}: {error}") from error


def _unreadable(path: Path, why: str) -> UnreadableModelDirectory:
    return UnreadableModelDirectory(
        f"cannot read the model directory {path}",
        evidence=why,
        advice="Give the path of a complete Hugging Face directory with safetensors weights.",
        path=str(path),
    )
