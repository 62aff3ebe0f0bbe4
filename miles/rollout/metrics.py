"""Metrics of rollouts and evaluations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from miles.rollout.base_types import Group
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.utils.metric_utils import compute_pass_rate, compute_statistics, dict_add_prefix, has_repetition
from miles.utils.types import Sample, SampleStatus

NUM_EXAMPLES = 4
_MAX_TEXT = 2000
MAX_CATEGORIES = 50
_MAX_NAME = 80


def rollout_metrics(args: Any, groups: Sequence[Group], rollout_time: float) -> dict[str, float]:
    """``rollout/...`` and ``perf/...`` of a rollout's samples."""
    samples = [sample for group in groups for sample in flat(group)]
    metrics = dict_add_prefix(sample_metrics(args, samples), "rollout/")
    metrics |= dict_add_prefix(_zero_std(args, groups), "rollout/zero_std/")
    rewards = _rewards(args, samples)
    if rewards:
        metrics["rollout/raw_reward"] = float(np.mean(rewards))
    if getattr(args, "log_passrate", False):
        rates = compute_pass_rate(rewards, args.n_samples_per_prompt, len(groups))
        metrics |= dict_add_prefix(rates, "passrate/")
    if getattr(args, "log_multi_turn", False):
        metrics |= dict_add_prefix(_multi_turn(args, samples), "multi_turn/")
    if getattr(args, "log_correct_samples", False):
        metrics |= dict_add_prefix(_correct_samples(args, samples), "rollout/correct_samples/")
    return metrics | _performance(args, samples, rollout_time)


def sample_metrics(args: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """Of the samples of a rollout or of an evaluation's data set, without prefix."""
    if not samples:
        return {}
    metrics = dict_add_prefix(compute_statistics([s.effective_response_length for s in samples]), "response_len/")
    metrics["repetition_frac"] = float(np.mean([has_repetition(s.response) for s in samples]))
    metrics["truncated_ratio"] = float(np.mean([s.status is SampleStatus.TRUNCATED for s in samples]))
    versions = [int(v) for s in samples for v in s.weight_versions if str(v).isdigit()]
    if versions:
        statistics = compute_statistics(versions)
        metrics |= {f"weight_version/{name}": statistics[name] for name in ("min", "max", "mean")}
        metrics["mixed_version_ratio"] = float(np.mean([len(set(s.weight_versions)) > 1 for s in samples]))
    prompt_tokens = sum(s.prefix_cache_info.total_prompt_tokens for s in samples)
    if prompt_tokens:
        cached = sum(s.prefix_cache_info.cached_tokens for s in samples)
        metrics["prefix_cache_hit_rate"] = cached / prompt_tokens
        metrics["avg_cached_tokens_per_sample"] = cached / len(samples)
    drafts = sum(s.spec_info.spec_draft_token_num for s in samples)
    if drafts:
        metrics["spec_accept_rate"] = sum(s.spec_info.spec_accept_token_num for s in samples) / drafts
    verified = sum(s.spec_info.spec_verify_ct for s in samples)
    if verified:
        metrics["spec_accept_length"] = sum(s.spec_info.completion_token_num for s in samples) / verified
    return metrics | _reward_categories(args, samples)


def _reward_categories(args: Any, samples: Sequence[Sample]) -> dict[str, float]:
    key = getattr(args, "log_reward_category", None)
    if not key:
        return {}
    counts = Counter(str(s.reward.get(key))[:_MAX_NAME] for s in samples if isinstance(s.reward, dict))
    shares = {f"error_cat/{name}": count / len(samples) for name, count in counts.most_common(MAX_CATEGORIES)}
    if rest := counts.total() - sum(count for _, count in counts.most_common(MAX_CATEGORIES)):
        shares["error_cat/(others)"] = rest / len(samples)
    return shares


def _multi_turn(args: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """Lengths with and without what tools and environments said, and how many turns the model had."""
    if not samples:
        return {}
    limit = getattr(args, "rollout_max_response_len", None) or math.inf
    found: dict[str, float] = {}
    for name, values in (
        ("raw_response_length/response_length", [s.response_length for s in samples]),
        ("wo_obs_response_length/response_length", [s.effective_response_length for s in samples]),
        ("multi_turn_metric/round_number", [turns(s) for s in samples]),
    ):
        statistics = compute_statistics(values)
        found |= {f"{name}_{which}": statistics[which] for which in ("mean", "max", "min")}
    clipped = [s.response_length >= limit for s in samples]
    return found | {"raw_response_length/response_length_clip_ratio": float(np.mean(clipped))}


def turns(sample: Sample) -> int:
    """``metadata["round_number"]`` if a generate function wrote it, else the stretches of tokens that the model made:
    those that count for the loss."""
    told = sample.metadata.get("round_number")
    if isinstance(told, int):
        return told
    if sample.loss_mask is None:
        return int(sample.response_length > 0)
    mask = np.asarray([0, *sample.loss_mask]) != 0
    return int((mask[1:] & ~mask[:-1]).sum())


def _correct_samples(args: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """Of those with reward 1."""
    correct = [s for s in samples if _rewards(args, [s]) == [1.0]]
    lengths = compute_statistics([s.effective_response_length for s in correct])
    metrics = {"count": float(len(correct)), "ratio": len(correct) / len(samples) if samples else 0.0}
    if correct:
        metrics["truncated_ratio"] = float(np.mean([s.status is SampleStatus.TRUNCATED for s in correct]))
    return metrics | dict_add_prefix(lengths, "response_len/")


def _zero_std(args: Any, groups: Sequence[Group]) -> dict[str, float]:
    """Groups that teach nothing relative to themselves, by their common reward."""
    counts: Counter[float] = Counter()
    sized = [rewards for group in groups if len(rewards := _rewards(args, flat(group))) > 1]
    for rewards in sized:
        if max(rewards) - min(rewards) <= 1e-8:
            counts[round(rewards[0], 1)] += 1
    metrics: dict[str, float] = {f"count_{reward}": float(count) for reward, count in sorted(counts.items())}
    if sized:
        metrics["all_zero_percentage"] = counts[0.0] / len(sized)
        metrics["all_one_percentage"] = counts[1.0] / len(sized)
    return metrics


def _performance(args: Any, samples: Sequence[Sample], rollout_time: float) -> dict[str, float]:
    metrics = {"perf/rollout_time": rollout_time}
    if not samples or rollout_time <= 0:
        return metrics
    engines = max(1, int(args.rollout_num_gpus or 1))
    for name, lengths in (
        ("", [s.response_length for s in samples]),
        ("effective_", [s.effective_response_length for s in samples]),
    ):
        metrics[f"perf/{name}tokens_per_gpu_per_sec"] = sum(lengths) / rollout_time / engines
        metrics[f"perf/{name}longest_sample_tokens_per_sec"] = max(lengths) / rollout_time
    waits = [s.non_generation_time for s in samples]
    if any(waits):
        metrics |= dict_add_prefix(compute_statistics(waits), "perf/non_generation_time/")
    return metrics


def _rewards(args: Any, samples: Sequence[Sample]) -> list[float]:
    """Rewards that are numbers."""
    values = [s.get_reward_value(args) if s.reward is not None else None for s in samples]
    return [float(v) for v in values if isinstance(v, int | float | np.integer | np.floating | np.bool_)]


def eval_metrics(args: Any, data: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``eval/...`` of an evaluation, by data set."""
    metrics: dict[str, float] = {}
    for name, entry in data.items():
        rewards = list(entry["rewards"])
        known = [float(r) for r in rewards if r is not None]
        if known:
            metrics[f"eval/{name}"] = float(np.mean(known))
        metrics[f"eval/{name}-none_reward_ratio"] = 1.0 - len(known) / len(rewards) if rewards else 0.0
        if entry.get("truncated") is not None and len(entry["truncated"]):
            metrics[f"eval/{name}-truncated_ratio"] = float(np.mean(entry["truncated"]))
        per_prompt = entry.get("n_samples_per_prompt") or args.n_samples_per_eval_prompt
        if per_prompt > 1 and len(known) == len(rewards):
            metrics |= dict_add_prefix(compute_pass_rate(known, per_prompt), f"eval/{name}-")
        samples = [s for s in entry.get("samples") or [] if isinstance(s, Sample)]
        metrics |= dict_add_prefix(sample_metrics(args, samples), f"eval/{name}/")
    return metrics


def eval_examples(data: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A few answers of each data set, for people."""
    found = []
    for name, entry in data.items():
        pairs = zip(entry.get("samples") or [], entry["rewards"], strict=False)
        for sample, reward in list(pairs)[:NUM_EXAMPLES]:
            prompt = sample.prompt if isinstance(sample.prompt, str) else str(sample.prompt)
            found.append(
                {
                    "dataset": name,
                    "prompt": prompt[-_MAX_TEXT:],
                    "response": sample.response[:_MAX_TEXT],
                    "label": None if sample.label is None else str(sample.label)[:_MAX_TEXT],
                    "reward": reward if isinstance(reward, int | float | str | None) else str(reward),
                }
            )
    return found
