"""Where checkpoints are, by the names of files: for the backends that read them and for the flags that name them.

Below ``--save`` each is a directory ``iter_0000012``; ``latest_checkpointed_iteration.txt`` names the newest that is
complete. ``miles convert`` writes ``release`` in place of an iteration. Imports no torch, reads no tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from miles.utils.lora import ADAPTER_CONFIG, ADAPTER_DIRECTORY
from miles.utils.replace_directory import recover_all
from miles_agents.errors import ConfigError, EnvironmentFault

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What the tracker says of weights that no training of ours made: those of ``miles convert``."""
FORMAT = "metadata.json"
"""Of a torch_dist directory: the file that is written last."""
FSDP_META = "meta.json"
"""Of a checkpoint of the FSDP backend: its counters."""
REFERENCE = "reference"
"""In a checkpoint of a run with ``--ref-update-interval``: the weights of the reference model."""
EXPORTED = ".complete"
"""Of a Hugging Face directory: we wrote it, and it is complete. Only such a one is overwritten."""


class NoSuchCheckpoint(ConfigError):
    """``--load``, ``--ref-load`` or ``--ckpt-step`` names a checkpoint that is not there."""

    code = "E-CKPT-001"


class DamagedCheckpoint(EnvironmentFault):
    """A checkpoint directory lacks files, or they cannot be read."""

    code = "E-CKPT-002"


@dataclass(frozen=True)
class FoundCheckpoint:
    """The directory of a checkpoint. ``rollout_id``: None for a release."""

    directory: Path
    rollout_id: int | None


def iteration_name(rollout_id: int) -> str:
    """Of the directory of a rollout."""
    return f"iter_{rollout_id:07d}"


def rollout_of(name: str) -> int | None:
    """Inverse of ``iteration_name``; None: it is no such name."""
    match = re.fullmatch(r"iter_(\d{7,})", name)
    return int(match[1]) if match else None


def backend_of(directory: Path) -> str | None:
    """``--train-backend`` of a checkpoint's directory; None: it is none."""
    if (directory / FORMAT).is_file():
        return "megatron"
    return "fsdp" if (directory / FSDP_META).is_file() and (directory / "model").is_dir() else None


def holds_adapter(directory: Path) -> bool:
    """Whether a checkpoint's directory is that of an adapter, without the weights below."""
    return (directory / ADAPTER_DIRECTORY / ADAPTER_CONFIG).is_file()


def find_checkpoint(root: str | Path | None, step: int | None = None) -> FoundCheckpoint | None:
    """The newest checkpoint below ``root``, or that of rollout ``step``; None if there is none.

    ``root`` may also be the directory of a checkpoint itself. A directory that the tracker does not name yet was never
    finished, and is no checkpoint. One that a crash left without its name while it was replaced gets it back.

    Raises:
        NoSuchCheckpoint: Not the one of ``step``.
        DamagedCheckpoint: The tracker names what is not there.
    """
    if root is None:
        return None
    root = Path(root)
    recover_all(root, "iter_*")
    if step is not None:
        return _of_step(root, step)
    if backend_of(root):
        return FoundCheckpoint(root, rollout_of(root.name))
    if not (root / TRACKER).is_file():
        return None
    said = (root / TRACKER).read_text(errors="replace").strip()
    name = said if said == RELEASE else iteration_name(int(said)) if said.isdecimal() else ""
    if not name or not (root / name).is_dir():
        raise DamagedCheckpoint(
            f"{root / TRACKER} names a checkpoint that is not there",
            evidence=f"it says {said!r}; there are: {_there(root)}",
            advice="Write the number of a complete checkpoint into it, or choose one with --ckpt-step.",
            path=str(root),
        )
    return FoundCheckpoint(root / name, rollout_of(name))


def _of_step(root: Path, step: int) -> FoundCheckpoint:
    directory = root / iteration_name(step)
    if not directory.is_dir():
        raise NoSuchCheckpoint(
            f"there is no checkpoint of rollout {step} in {root}",
            evidence=f"there are: {_there(root)}",
            advice="Choose one of these with --ckpt-step.",
            path=str(directory),
        )
    return FoundCheckpoint(directory, step)


def _there(root: Path) -> str:
    names = sorted(path.name for path in root.glob("iter_*")) if root.is_dir() else []
    return ", ".join(names) or "none"


def is_hf_directory(path: Path) -> bool:
    """Whether it looks like a Hugging Face model directory."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))
