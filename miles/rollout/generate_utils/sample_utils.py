"""Putting samples together."""

from __future__ import annotations

import copy
from typing import Any

from miles.utils.types import BadSample, Sample


def merge_samples(samples: list[Sample], tokenizer: Any) -> Sample:
    """The turns of one conversation as one sample.

    Each sample's tokens must begin with those of the one before; what lies between (tool results, next question) is
    part of the response with loss mask 0 and log-prob 0.

    Raises:
        BadSample: A sample does not go on from the one before.
    """
    if not samples:
        raise BadSample("there are no samples to merge", evidence="an empty list", advice="Merge at least one.")
    merged = copy.deepcopy(samples[0])
    merged.loss_mask = list(merged.loss_mask or [1] * merged.response_length)
    merged.rollout_log_probs = list(merged.rollout_log_probs or [0.0] * merged.response_length)
    for nxt in samples[1:]:
        _append(merged, nxt)
    if len(samples) > 1:
        merged.response = tokenizer.decode(merged.tokens[len(merged.tokens) - merged.response_length :])
    return merged


def _append(merged: Sample, nxt: Sample) -> None:
    before = len(merged.tokens)
    observed = len(nxt.tokens) - nxt.response_length - before
    if observed < 0 or nxt.tokens[:before] != merged.tokens:
        raise BadSample(
            f"sample {nxt.index} does not go on from the turn before",
            evidence=f"the first {before} of its tokens must be those of the turn before; they are not",
            advice="Let each turn's request be the tokens so far and the new ones.",
        )
    assert merged.loss_mask is not None
    assert merged.rollout_log_probs is not None
    merged.loss_mask += [0] * observed + list(nxt.loss_mask or [1] * nxt.response_length)
    merged.rollout_log_probs += [0.0] * observed + list(nxt.rollout_log_probs or [0.0] * nxt.response_length)
    merged.tokens = list(nxt.tokens)
    merged.response_length += observed + nxt.response_length
    merged.weight_versions = merged.weight_versions + nxt.weight_versions
    merged.status, merged.reward = nxt.status, nxt.reward
    merged.metadata = {**merged.metadata, **nxt.metadata}
    for name in ("rollout_routed_experts", "rollout_indexer_topk"):
        if getattr(nxt, name) is not None:  # engines answer for the whole request
            setattr(merged, name, getattr(nxt, name))
    merged.non_generation_time += nxt.non_generation_time
    for name in ("spec_info", "prefix_cache_info"):
        sums, more = getattr(merged, name), getattr(nxt, name)
        setattr(merged, name, type(sums)(**{key: value + vars(more)[key] for key, value in vars(sums).items()}))
