"""Rollouts on disk, to train on again: ``--save-debug-rollout-data`` and ``--load-debug-rollout-data``.

``{"rollout_id", "metadata", "samples": [sample as dict, ...]}`` by ``torch.save``; read with ``weights_only=True``, so
that no file's code runs. Arrays are saved as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from miles.rollout.base_types import Group
from miles.rollout.data_source import save_with_torch
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.saved_state import NotSavable
from miles.utils.types import Sample
from miles_agents.errors import ConfigError


class BadDebugData(ConfigError):
    """A file of rollout data is not there, or holds something else."""

    code = "E-ROLL-016"


def path_of(template: str, rollout_id: int | str) -> Path:
    """``{rollout_id}`` of the template filled in."""
    return Path(template.format(rollout_id=rollout_id))


def save_rollout_data(template: str, rollout_id: int | str, groups: Sequence[Group], metadata: dict[str, Any]) -> Path:
    """Write a rollout's samples. ``rollout_id`` of evaluations is ``eval_<id>``.

    Raises:
        CannotSave: The file cannot be written. NotSavable: A sample holds an object that is no plain value.
    """
    samples = [plain(s.to_dict(), f"samples[{i}]") for i, s in enumerate(s for g in groups for s in flat(g))]
    path = path_of(template, rollout_id)
    save_with_torch(path, {"rollout_id": rollout_id, "metadata": plain(metadata, "metadata"), "samples": samples})
    return path


def load_rollout_data(template: str, rollout_id: int, subsample: float | None = None) -> list[Group]:
    """A rollout's samples by prompt group.

    Args:
        template: Path with ``{rollout_id}``.
        rollout_id: Which.
        subsample: Only this fraction of the groups, the first ones; at least one.

    Raises:
        BadDebugData: There is no such file, or it holds something else.
    """
    path = path_of(template, rollout_id)
    if not path.is_file():
        raise BadDebugData(
            f"there is no rollout data for rollout {rollout_id}",
            evidence=f"looked for {path}",
            advice="Check --load-debug-rollout-data, and --num-rollout against the files there are.",
        )
    import torch

    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
        samples = [Sample.from_dict(_with_arrays(entry)) for entry in data["samples"]]
    except Exception as error:  # boundary: a file of whatever origin
        raise BadDebugData(
            f"{path} holds no rollout data",
            evidence=f"{type(error).__name__}: {str(error)[:500]}",
            advice="Use a file that --save-debug-rollout-data wrote.",
        ) from error
    groups = _grouped(samples)
    return groups if subsample is None else groups[: max(1, int(len(groups) * subsample))]


def _grouped(samples: Sequence[Sample]) -> list[Group]:
    groups: dict[Any, Group] = {}
    for position, sample in enumerate(samples):
        key = ("alone", position) if sample.group_index is None else sample.group_index
        groups.setdefault(key, []).append(sample)
    return list(groups.values())


def _with_arrays(entry: dict[str, Any]) -> dict[str, Any]:
    for name in ("rollout_routed_experts", "rollout_indexer_topk"):
        if entry.get(name) is not None:
            entry[name] = entry[name].numpy()
    return entry


def plain(value: Any, where: str) -> Any:
    """The same in values that ``torch.load(weights_only=True)`` reads.

    Raises:
        NotSavable: It is something else; names the path to it.
    """
    if value is None or isinstance(value, str | bool | int | float | bytes):
        return value
    if isinstance(value, Enum):
        return plain(value.value, where)
    if isinstance(value, dict):
        return {plain(k, where): plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), where)
    return _plain_number(value, where)


def _plain_number(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    raise NotSavable(
        f"a sample cannot be saved: {where} is a {type(value).__module__}.{type(value).__qualname__}",
        evidence=str(value)[:200],
        advice="Keep plain values, arrays or tensors in the metadata of samples.",
    )
