"""The benchmark's user code in our job, given as ``--custom-generate-function-path``; the job's own function generates.

``generate``: each answer has the length that its prompt's row asks for. ``generate_beside_memcpy``: that, and once for
each iteration a memcpy of as many bytes as the weight update moves, which is written to a file.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002  # the name that tells this form apart
    """Exactly as many tokens as asked for, whatever they are."""
    from miles.rollout.generate_hub import single_turn

    sample = input.sample
    length = answer_length(sample.metadata, sample.index or 0)
    params = {**input.sampling_params, "max_new_tokens": length, "ignore_eos": True}
    return await single_turn.generate(replace(input, sampling_params=params))


async def generate_beside_memcpy(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
    """``generate``, after a memcpy if it is the iteration's first answer."""
    wanted: dict[str, Any] = input.sample.metadata["memcpy"]
    if (input.sample.index or 0) % wanted["every"] == 0:
        await asyncio.to_thread(_memcpy_told, wanted["bytes"], Path(wanted["file"]))
    return await generate(input)


def answer_length(metadata: dict[str, Any], index: int) -> int:
    """Tokens of the group's answer number ``index`` (samples are numbered through; groups have the same size)."""
    lengths = metadata["lengths"]
    return int(lengths[index % len(lengths)])


def memcpy(num_bytes: int) -> float:
    """Seconds of copying so many bytes into memory that is there already, on one core."""
    source, target = _buffers(num_bytes)
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


def _memcpy_told(num_bytes: int, path: Path) -> None:
    seconds = memcpy(num_bytes)
    with path.open("a") as file:
        file.write(json.dumps({"memcpy": seconds}) + "\n")


@cache
def _buffers(num_bytes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    source, target = np.empty(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    source[:], target[:] = 1, 2  # every page is there
    return source, target
