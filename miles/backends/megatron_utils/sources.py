"""Where the weights of the actor, of the reference model and of a teacher come from, by the flags."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from miles.backends.checkpoint_layout import (
    REFERENCE,
    FoundCheckpoint,
    NoSuchCheckpoint,
    find_checkpoint,
    holds_adapter,
    is_hf_directory,
)
from miles.backends.lora.files import weights_apart
from miles.backends.training_utils.loss_hub.settings import moves_reference


@dataclass(frozen=True)
class Source:
    """``resumes``: a checkpoint whose run goes on. ``weights``: else the directory that weights are read from; with
    adapters, those below. ``is_own``: it is ``--load``, and so has what only a model of this role has (a critic's value
    head). ``adapter``: the checkpoint that adapters are read from, if any. ``apart``: with adapters, the weights below
    are not those of ``--ref-load`` or ``--hf-checkpoint``: ``--load`` names them, or did when the adapter was begun."""

    weights: Path
    resumes: FoundCheckpoint | None = None
    is_own: bool = False
    adapter: Path | None = None
    apart: bool = False


def choose_source(args: Namespace) -> Source:
    """``--load`` if it holds a checkpoint, else ``--ref-load``, else ``--hf-checkpoint``.

    A checkpoint of ``miles convert``, or ``--finetune``, gives weights only. One of adapters says nothing of the
    weights below, which are those that a fresh start has, unless it says that they were apart from these.
    """
    found = find_checkpoint(args.load, getattr(args, "ckpt_step", None))
    if found is not None:
        weights_only = found.rollout_id is None or getattr(args, "finetune", False)
        if getattr(args, "lora_rank", 0) and holds_adapter(found.directory):
            apart = weights_apart(found.directory)
            return Source(
                apart or reference_source(args),
                None if weights_only else found,
                adapter=found.directory,
                apart=apart is not None,
            )
        return Source(found.directory, None if weights_only else found, is_own=True, apart=True)
    if args.load is not None and is_hf_directory(Path(args.load)):
        return Source(Path(args.load), apart=True)
    return Source(reference_source(args))


def reference_source(args: Namespace) -> Path:
    """``--ref-load``, which is a Hugging Face directory or has a checkpoint, else ``--hf-checkpoint``.

    Raises:
        NoSuchCheckpoint: It is neither.
    """
    if args.ref_load is None:
        return Path(args.hf_checkpoint)
    return _weights_of("--ref-load", Path(args.ref_load), getattr(args, "ref_ckpt_step", None))


def moved_reference(args: Namespace, source: Source) -> Path | None:
    """The reference model as the checkpoint that is resumed has it (``--ref-update-interval``). None: it has none."""
    if source.resumes is None or not moves_reference(args):
        return None
    directory = source.resumes.directory / REFERENCE
    return directory if directory.is_dir() else None


def teacher_source(args: Namespace) -> Path:
    """``--opd-teacher-load``, which is a Hugging Face directory or has a checkpoint.

    Raises:
        NoSuchCheckpoint: It is neither.
    """
    return _weights_of("--opd-teacher-load", Path(args.opd_teacher_load), getattr(args, "opd_teacher_ckpt_step", None))


def _weights_of(flag: str, root: Path, step: int | None) -> Path:
    found = find_checkpoint(root, step)
    if found is not None:
        return found.directory
    if is_hf_directory(root):
        return root
    raise NoSuchCheckpoint(
        f"{flag} {root} holds no checkpoint",
        evidence="it has neither latest_checkpointed_iteration.txt nor config.json with *.safetensors"
        if root.is_dir()
        else "there is no such directory",
        advice="Give a Hugging Face directory, or one that `miles convert` or a run has written.",
        path=str(root),
    )
