"""Rollouts as ``--save-debug-rollout-data`` writes them, made up: random answers with random rewards."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from miles.utils.types import Sample


def write_rollouts(directory: Path, *, rollouts: int, groups: int = 8, per_group: int = 8, seed: int = 0) -> str:
    """One file per rollout; returns the template for ``--load-debug-rollout-data``."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for rollout_id in range(rollouts):
        samples = []
        for index in range(groups * per_group):
            prompt, answer = _tokens(rng, 3, 9), _tokens(rng, 1, 12)
            sample = Sample(
                group_index=rollout_id * groups + index // per_group,
                index=rollout_id * groups * per_group + index,
                tokens=prompt + answer,
                response_length=len(answer),
                reward=rng.random(),
                rollout_log_probs=[-rng.random() for _ in answer],
                status=Sample.Status.COMPLETED,
            )
            samples.append(sample.to_dict())
        torch.save({"rollout_id": rollout_id, "metadata": {}, "samples": samples}, directory / f"{rollout_id}.pt")
    return f"{directory}/{{rollout_id}}.pt"


def _tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(low, high))]
