"""Adapters in the layout that ``peft`` reads: ``adapter_config.json`` and ``adapter_model.safetensors``.

Beside them lies ``base.json``, with the checksum of the weights that the adapter belongs to: on others it would be
noise. It says, too, whether these were apart from what ``--ref-load`` and ``--hf-checkpoint`` name, and the checksum of
the reference that the run was held to, so that a run that goes on has the same two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from miles.utils.lora import ADAPTER_CONFIG, ADAPTER_DIRECTORY, ADAPTER_WEIGHTS, LoraSettings
from miles_agents.errors import ConfigError

BASE = "base.json"
Pair = tuple[torch.Tensor, torch.Tensor]
"""``A`` ``[rank, in]`` and ``B`` ``[out, rank]``."""


class BadAdapter(ConfigError):
    """A directory holds no adapter that this run can use."""

    code = "E-MODEL-004"


@dataclass(frozen=True)
class Below:
    """The weights below an adapter.

    Attributes:
        path: Where they are.
        checksum: Their ``bit_sum``.
        apart: They are not those of ``--ref-load`` or ``--hf-checkpoint``: ``--load`` named them when it was begun.
        reference: ``bit_sum`` of the reference model; None: the run has none.
    """

    path: Path
    checksum: int
    apart: bool = False
    reference: int | None = None


def write_adapter(directory: Path, pairs: Mapping[str, Pair], settings: LoraSettings, below: Below) -> None:
    """Into a new directory. ``pairs``: by the layer's full name.

    Raises:
        OSError, SafetensorError: The disk is full, or forbids it.
    """
    directory.mkdir()
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.detach().to("cpu", copy=True).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.detach().to("cpu", copy=True).contiguous()
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(_config(settings, str(below.path)), indent=2) + "\n")
    about = {"checksum": below.checksum, "lora_type": settings.kind, "apart": below.apart, "reference": below.reference}
    (directory / BASE).write_text(json.dumps(about) + "\n")


def _config(settings: LoraSettings, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Pair]]:
    """``adapter_config.json``, and the pairs by the layer's full name.

    Raises:
        BadAdapter: Files are missing, or are of another kind of adapter.
    """
    config = _json(directory, ADAPTER_CONFIG)
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _bad(directory, f"{ADAPTER_WEIGHTS}: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise _bad(directory, f"{ADAPTER_CONFIG} describes another kind: it must be LORA, without biases or DoRA")
    if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise _bad(directory, f"{ADAPTER_CONFIG} scales layers differently: use_rslora or a pattern of ranks")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        if rest not in ("A.weight", "B.weight"):
            raise _bad(directory, f"{ADAPTER_WEIGHTS} holds {name}, which is no part of a linear layer's adapter")
        parts.setdefault(module, {})[rest[0]] = tensor
    if halves := [module for module, pair in parts.items() if len(pair) != 2]:
        raise _bad(directory, f"{ADAPTER_WEIGHTS} holds one half only of {halves[0]}")
    return config, {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def check_config(directory: Path, config: Mapping[str, Any], settings: LoraSettings) -> None:
    """Raises:
    BadAdapter: The adapter is of another rank, scale or set of layers than the flags say.
    """
    listed = config.get("target_modules")
    theirs = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha"), "target_modules": sorted(listed or [])}
    ours = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": sorted(settings.targets)}
    different = [f"{key}: {theirs[key]} there, {ours[key]} wanted" for key in ours if theirs[key] != ours[key]]
    if different:
        raise _bad(
            directory,
            "; ".join(different),
            advice="Give --lora-rank, --lora-alpha, --target-modules and --exclude-modules as it was made with.",
        )


def check_checkpoint(checkpoint: Path, settings: LoraSettings, checksum: int) -> None:
    """That the adapter in a checkpoint of ours goes on with these flags, on a base of this checksum.

    Raises:
        BadAdapter: It does not.
    """
    directory = checkpoint / ADAPTER_DIRECTORY
    check_config(directory, _json(directory, ADAPTER_CONFIG), settings)
    about = _json(directory, BASE)
    if about.get("lora_type") != settings.kind:
        raise _bad(directory, f"it was made with --lora-type {about.get('lora_type')}", advice="Give that one.")
    check_base(checkpoint, checksum)


def base_checksum(checkpoint: Path) -> int:
    """Of the weights that the adapter in a checkpoint belongs to."""
    checksum = _json(checkpoint / ADAPTER_DIRECTORY, BASE).get("checksum")
    if not isinstance(checksum, int):
        raise _bad(checkpoint / ADAPTER_DIRECTORY, f"{BASE} holds no checksum")
    return checksum


def weights_apart(checkpoint: Path) -> Path | None:
    """Where the weights below the adapter in a checkpoint are, if neither ``--ref-load`` nor ``--hf-checkpoint`` named
    them, or the same, when it was begun.

    Raises:
        BadAdapter: They are not there any more.
    """
    directory = checkpoint / ADAPTER_DIRECTORY
    about = _json(directory, BASE)
    if not about.get("apart") or about.get("reference") == about.get("checksum"):
        return None
    path = Path(str(_json(directory, ADAPTER_CONFIG).get("base_model_name_or_path")))
    if not path.is_dir():
        raise _bad(
            directory,
            f"the weights below it, which it was begun on with --load, are not at {path}",
            advice=f"Put them back there, or change base_model_name_or_path in {ADAPTER_CONFIG}.",
        )
    return path


def check_reference(checkpoint: Path, checksum: int) -> None:
    """That a run goes on with the reference model that it had.

    Raises:
        BadAdapter: It would be held to another one.
    """
    directory = checkpoint / ADAPTER_DIRECTORY
    had = _json(directory, BASE).get("reference")
    if had is not None and had != checksum:
        raise _bad(
            directory,
            f"the reference model is not the one it was trained with: checksum {checksum}, and it was {had}",
            advice="Give --ref-load, or --hf-checkpoint, as the run had it; the weights below the adapter are found "
            "by its checkpoint. --finetune begins anew with another reference.",
        )


def check_base(checkpoint: Path, checksum: int) -> None:
    """Raises:
    BadAdapter: The adapter in the checkpoint belongs to weights of another checksum.
    """
    directory = checkpoint / ADAPTER_DIRECTORY
    belongs = base_checksum(checkpoint)
    if belongs != checksum:
        path = _json(directory, ADAPTER_CONFIG).get("base_model_name_or_path")
        raise _bad(
            directory,
            f"it belongs to other weights, those of {path}: their checksum is {belongs}, this run has {checksum}",
            advice="Give --ref-load or --hf-checkpoint as it was made with, in the same dtype.",
        )


def check_modules(directory: Path, pairs: Mapping[str, Pair], settings: LoraSettings, names: Iterable[str]) -> None:
    """That there is a pair for each layer of ``names``, and for no other; and that ``A`` is shared where it must be.

    Raises:
        BadAdapter: Names one that is wrong.
    """
    names = list(names)
    if wrong := sorted(set(pairs) ^ set(names)):
        here = "has no such layer to adapt" if wrong[0] in pairs else "wants one"
        raise _bad(directory, f"{len(wrong)} layers differ, such as {wrong[0]}: the model {here}")
    for name in names:
        shared = settings.sharer(name)
        if not torch.equal(pairs[name][0], pairs[shared][0]):
            raise _bad(
                directory, f"{name} and {shared} have different A matrices", advice="Give --lora-type canonical_lora."
            )


def _json(directory: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((directory / name).read_text())
    except (OSError, ValueError) as error:
        raise _bad(directory, f"{name}: {error}") from error
    if not isinstance(value, dict):
        raise _bad(directory, f"{name} holds no JSON object")
    return value


def _bad(
    directory: Path, evidence: str, advice: str = "Give the directory of a LoRA adapter in peft's layout."
) -> BadAdapter:
    return BadAdapter(f"the adapter {directory} cannot be used", evidence=evidence, advice=advice, path=str(directory))
