"""Rollouts as text for people and scripts: ``--save-debug-trajectory-data``, one JSON object per sample and line.

``{"rollout_id", "group_index", "index", "execution", "status", "reward", "label", "messages": [{"role", "content"}],
"response_length", "weight_versions", "metadata"}``. The messages are the prompt's, and the response in stretches: what
the model wrote is the assistant's; what its loss mask leaves out (results of tools, say) is ``masked``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from miles.rollout.base_types import Group
from miles.rollout.debug_data import path_of
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.rewards import execution_of
from miles.rollout.saved_state import cannot_save
from miles.utils.processing_utils import shared_tokenizer
from miles.utils.types import Sample

MODEL, OTHERS, TEXT = "assistant", "masked", "prompt"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE


def save_trajectories(args: Any, rollout_id: int | str, groups: Iterable[Group]) -> Path:
    """Write a rollout's samples. ``rollout_id`` of evaluations is ``eval_<id>``.

    Raises:
        CannotSave: The file cannot be written.
    """
    path = path_of(args.save_debug_trajectory_data, rollout_id)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    samples = [sample for group in groups for sample in flat(group)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for position, sample in enumerate(samples):
                file.write(orjson.dumps(_row(args, rollout_id, sample, position), default=str, option=_OPTIONS))
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise cannot_save(path, error) from error
    return path


def _row(args: Any, rollout_id: int | str, sample: Sample, position: int) -> dict[str, Any]:
    return {
        "rollout_id": rollout_id,
        "group_index": sample.group_index,
        "index": sample.index,
        "execution": execution_of(sample, position),
        "status": sample.status.value,
        "reward": sample.reward,
        "label": sample.label,
        "messages": [*_prompt(sample), *_response(args, sample)],
        "response_length": sample.response_length,
        "weight_versions": sample.weight_versions,
        "metadata": sample.metadata,
    }


def _prompt(sample: Sample) -> list[dict[str, Any]]:
    if isinstance(sample.prompt, str):
        return [{"role": TEXT, "content": sample.prompt}]
    return list(sample.prompt)


def _response(args: Any, sample: Sample) -> list[dict[str, Any]]:
    mask = sample.loss_mask
    if mask is None or all(mask) or len(mask) != sample.response_length:
        return [{"role": MODEL, "content": sample.response}]
    tokenizer = shared_tokenizer(args.hf_checkpoint, args.chat_template_path)
    ids = sample.tokens[len(sample.tokens) - sample.response_length :]
    return [
        {"role": MODEL if learnt else OTHERS, "content": str(tokenizer.decode(part))}
        for part, learnt in _stretches(ids, mask)
    ]


def _stretches(ids: Sequence[int], mask: Sequence[int]) -> list[tuple[list[int], int]]:
    found: list[tuple[list[int], int]] = []
    for token, learnt in zip(ids, mask, strict=True):
        if not found or found[-1][1] != learnt:
            found.append(([], learnt))
        found[-1][0].append(token)
    return found
