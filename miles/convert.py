"""``miles convert``: between Hugging Face directories and torch_dist checkpoints of Megatron, in one process.

What is written is written aside and renamed; nothing that is there is overwritten. A torch_dist checkpoint made here
can be loaded with any tensor-parallel size.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from miles_agents.errors import MilesError


def main(argv: Sequence[str]) -> int:
    """Run ``miles convert argv...``. Returns the exit code: 0, or 2 for an error that was told on stderr."""
    options = _parser().parse_args(list(argv))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        with _without_others_deprecations():
            if options.command == "hf-to-torch-dist":
                hf_to_torch_dist(options.source, options.destination)
            else:
                torch_dist_to_hf(options.source, options.destination, options.hf_checkpoint, step=options.ckpt_step)
    except MilesError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{options.destination} is complete\n")
    return 0


@contextlib.contextmanager
def _without_others_deprecations() -> Iterator[None]:
    """What torch and megatron.core say to each other's developers is nothing that a user can act on."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)(\.|$)")
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles convert", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("hf-to-torch-dist", help="for --load and --ref-load")
    there.add_argument("source", type=Path, help="Hugging Face directory with safetensors weights")
    there.add_argument("destination", type=Path, help="a new directory")
    back = commands.add_parser("torch-dist-to-hf", help="for engines and transformers")
    back.add_argument("source", type=Path, help="--save directory of a run, or one of its iter_ directories")
    back.add_argument("destination", type=Path, help="a new directory")
    back.add_argument(
        "--hf-checkpoint",
        type=Path,
        required=True,
        help="directory that config and tokenizer are taken from, and the weights that an adapter belongs to",
    )
    back.add_argument("--ckpt-step", type=int, help="rollout whose checkpoint is converted; default: the newest")
    return parser


def hf_to_torch_dist(source: Path, destination: Path) -> None:
    """Write ``destination/release`` and the tracker file that names it.

    Raises:
        UnreadableModelDirectory, BadModelDirectory, UnsupportedModel: Of the source.
        DestinationExists: There is something already.
        CannotWriteCheckpoint: The disk is full, or forbids it.
    """
    from miles.backends.checkpoint_layout import RELEASE, TRACKER
    from miles.backends.hf_directory import MTP_LAYERS, HFDirectory
    from miles.backends.megatron_utils.checkpoint import TrainState, save_checkpoint
    from miles.backends.megatron_utils.standalone import StandaloneModel

    _refuse_existing(destination)
    directory = HFDirectory(source)
    with _single_rank(), _aside(destination) as aside:
        further = any(name.startswith(MTP_LAYERS) for name in directory.names)
        model = StandaloneModel(directory.config(), directory.common_dtype(), further=further)
        model.load_hf(directory)
        (aside / RELEASE).mkdir()
        state = TrainState(model.shape, model.parallel, model.module)
        save_checkpoint(aside / RELEASE, state, rollout_id=None, generators=False)
        (aside / TRACKER).write_text(RELEASE)


def torch_dist_to_hf(source: Path, destination: Path, hf_checkpoint: Path, *, step: int | None = None) -> None:
    """Write the weights of a checkpoint as a Hugging Face directory. An adapter (``--lora-rank``) is merged into the
    weights of ``hf_checkpoint``.

    Raises:
        NoSuchCheckpoint, DamagedCheckpoint, CheckpointMismatch, BadAdapter: Of the source.
        DestinationExists: There is something already.
        CannotExport: The disk is full, or forbids it.
    """
    from miles.backends.checkpoint_layout import NoSuchCheckpoint, find_checkpoint, holds_adapter
    from miles.backends.hf_directory import HFDirectory, read_config
    from miles.backends.hf_export import export_hf
    from miles.backends.lora.merging import MergedModel
    from miles.backends.megatron_utils.standalone import StandaloneModel, checkpoint_dtype, has_further_layers

    _refuse_existing(destination)
    config, args = read_config(hf_checkpoint), Namespace(hf_checkpoint=str(hf_checkpoint))
    found = find_checkpoint(source, step)
    if found is None:
        raise NoSuchCheckpoint(
            f"there is no torch_dist checkpoint in {source}",
            evidence="it has no latest_checkpointed_iteration.txt" if source.is_dir() else "there is no such directory",
            advice="Give the --save directory of a run of --train-backend megatron.",
            path=str(source),
        )
    with _single_rank():
        if holds_adapter(found.directory):
            export_hf(MergedModel(HFDirectory(hf_checkpoint), found.directory), args, destination)
            return
        further = has_further_layers(found.directory)
        model = StandaloneModel(config, checkpoint_dtype(found.directory), further=further)
        model.load_torch_dist(found.directory)
        export_hf(model, args, destination)


def _refuse_existing(destination: Path) -> None:
    from miles.backends.megatron_utils.errors import DestinationExists

    if destination.exists():
        raise DestinationExists(
            f"there is something at {destination} already",
            evidence="a directory" if destination.is_dir() else "a file",
            advice="Choose another destination, or remove what is there.",
            path=str(destination),
        )


@contextlib.contextmanager
def _aside(destination: Path) -> Iterator[Path]:
    """A directory that becomes ``destination`` on an orderly end, and goes on any other."""
    from miles.backends.megatron_utils.errors import CannotWriteCheckpoint

    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        try:
            yield aside
            aside.chmod(0o755)
            aside.rename(destination)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise CannotWriteCheckpoint(
            f"{destination} could not be written",
            evidence=str(error),
            advice="Make room on the disk, or choose another destination.",
            path=str(destination),
        ) from error


@contextlib.contextmanager
def _single_rank() -> Iterator[None]:
    """``torch.distributed`` of this process alone, without a port."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        from miles.backends.megatron_utils.parallel import leave_parallel

        leave_parallel()
        dist.destroy_process_group()
