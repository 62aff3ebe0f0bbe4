"""From prompt groups to train data: one list per column, one entry per sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from miles.rollout.base_types import Group
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.hooks import load_hook
from miles.rollout.rewards import execution_of, post_process_rewards
from miles.utils.train_data import BadTrainData, dropped_rows
from miles.utils.types import RolloutBatch, Sample, SampleStatus
from miles_agents.errors import ConfigError

_OPTIONAL = (
    "rollout_log_probs", "rollout_routed_experts", "rollout_indexer_topk", "teacher_log_probs", "opd_reverse_kl",
)  # fmt: skip


class NothingToTrain(ConfigError):
    """A rollout does not give as many samples as one optimizer step takes."""

    code = "E-ROLL-007"


def trim(args: Any, groups: list[Group]) -> tuple[list[Group], list[Group]]:
    """The groups that fill whole optimizer steps, and the surplus at the end.

    A step counts executions (``execution_of``), of which each may have made several samples. Where no number of whole
    groups fills steps exactly, the fewest that fill the first step are kept, and its surplus executions are dropped
    by the schedule. Nothing is trimmed with ``--disable-rollout-trim-samples``, or if user code numbered executions
    by itself (``Sample.rollout_id``), or with ``--allow-partial-train-step``, where the last step may be smaller. With
    ``--use-dynamic-global-batch-size`` a step is the data-parallel size.

    Raises:
        NothingToTrain: Not even one step is filled.
    """
    if args.disable_rollout_trim_samples or (args.allow_partial_train_step and args.use_dynamic_batch_size):
        return groups, []
    if any(s.rollout_id is not None for g in groups for s in flat(g)):
        return groups, []
    step = int(args.dp_size) if args.use_dynamic_global_batch_size else int(args.global_batch_size)
    counts = _executions_so_far(groups)
    exact = [i for i, count in enumerate(counts, 1) if count % step == 0]
    enough = [i for i, count in enumerate(counts, 1) if count >= step]
    kept = exact[-1] if exact else enough[0] if enough else 0
    if kept == 0:
        sizes = [len(flat(group)) for group in groups]
        raise NothingToTrain(
            f"the rollout's {max(counts, default=0)} executions do not fill a step of {step}",
            evidence=f"{len(groups)} prompt groups of {min(sizes, default=0)} to {max(sizes, default=0)} samples",
            advice="Choose --global-batch-size so that rollout_batch_size x n_samples_per_prompt is a multiple of it.",
        )
    return groups[:kept], groups[kept:]


def untrained(
    groups: Sequence[Group], data: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> tuple[list[Group], list[Group]]:
    """Groups of which no part holds anything, and groups of which the parts hold some samples only.

    Args:
        groups: What was converted; all samples have their group's number.
        data: What it was converted to.
        parts: What that was split into.

    Returns:
        The two; of a prompt whose samples came as several groups, all of them in the first, one in the second.

    Raises:
        BadTrainData: It cannot be told, because a conversion of the user's changed the number of samples.
    """
    rows = len(data["tokens"])
    dropped = set(dropped_rows(parts, rows))
    if not dropped:
        return [], []
    owners = _group_numbers(groups, data, rows)
    lost = {owners[row] for row in dropped}
    trained = {owner for row, owner in enumerate(owners) if row not in dropped}
    whole = [group for group in groups if flat(group)[0].group_index in lost - trained]
    part = {number: group for group in groups if (number := flat(group)[0].group_index) in lost & trained}
    return whole, list(part.values())


def _group_numbers(groups: Sequence[Group], data: Mapping[str, Any], rows: int) -> list[int | None]:
    """Of each row of the train data."""
    samples = [(sample, flat(group)[0].group_index) for group in groups for sample in flat(group)]
    if len(samples) == rows:
        return [number for _, number in samples]
    by_index = {sample.index: number for sample, number in samples}
    indices = list(data.get("sample_indices") or [])
    if len(indices) != rows or not all(index in by_index for index in indices):
        raise BadTrainData(
            "samples that do not fill an optimizer step cannot be traced to their prompts",
            evidence=f"{len(samples)} samples were converted to {rows}, without sample_indices of theirs",
            advice="Return sample_indices (Sample.index of each) from --custom-convert-samples-to-train-data-path, "
            "or as many entries as samples, or whole steps only.",
        )
    return [by_index[index] for index in indices]


def _executions_so_far(groups: Sequence[Group]) -> list[int]:
    """How many different executions made the samples up to and with each group."""
    seen: set[int] = set()
    counts: list[int] = []
    position = 0
    for group in groups:
        for sample in flat(group):
            seen.add(execution_of(sample, position))
            position += 1
        counts.append(len(seen))
    return counts


async def convert(args: Any, samples: list[Sample]) -> RolloutBatch:
    """Train data of samples.

    Raises:
        HookFailed, BadHookResult: Of ``--custom-convert-samples-to-train-data-path``. BadSample, UnequalSiblings.
    """
    hook = load_hook(args.custom_convert_samples_to_train_data_path, "--custom-convert-samples-to-train-data-path")
    if hook is None:
        return await convert_samples_to_train_data(args, samples)
    data = await hook(args, samples)
    if not isinstance(data, dict) or "tokens" not in data:
        raise hook.bad_result(data, "a dict of columns, with tokens, response_lengths, loss_masks, rewards and so on")
    return data


async def convert_samples_to_train_data(args: Any, samples: list[Sample]) -> RolloutBatch:
    """Train data by the default rules."""
    for sample in samples:
        _fill_experts(sample)
        sample.validate()
    raw_rewards, rewards = await post_process_rewards(args, samples)
    masks = [_loss_mask(sample) for sample in samples]
    executions = [execution_of(sample, i) for i, sample in enumerate(samples)]
    sums: Counter[int] = Counter()
    for execution, mask in zip(executions, masks, strict=True):
        sums[execution] += sum(mask)
    if samples and "raw_reward" in samples[0].metadata:
        raw_rewards = [sample.metadata["raw_reward"] for sample in samples]
    data: RolloutBatch = {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": rewards,
        "raw_reward": raw_rewards,
        "truncated": [int(sample.status is SampleStatus.TRUNCATED) for sample in samples],
        "sample_indices": [i if sample.index is None else sample.index for i, sample in enumerate(samples)],
        "rollout_ids": executions,
        "loss_masks": masks,
        "rollout_mask_sums": [sums[execution] for execution in executions],
    }
    data |= _optional_columns(samples)
    if args.use_dynamic_global_batch_size:
        data["dynamic_global_batch_size"] = len(set(executions))
    return data


def _fill_experts(sample: Sample) -> None:
    """What was appended behind the last answer of an engine, a tool's result for one, has no recorded experts, and
    needs none: no trained token comes after it. Rows of -1 say so."""
    experts, mask = sample.rollout_routed_experts, _loss_mask(sample)
    if experts is None:
        return
    trained = max((i for i, kept in enumerate(mask) if kept), default=-1)
    needed = len(sample.tokens) - len(mask) + trained if trained >= 0 else 0
    if needed <= len(experts) < len(sample.tokens) - 1:
        missing = np.full((len(sample.tokens) - 1 - len(experts), *experts.shape[1:]), -1, experts.dtype)
        sample.rollout_routed_experts = np.concatenate([experts, missing])


def _loss_mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask


def _optional_columns(samples: Sequence[Sample]) -> RolloutBatch:
    """Columns that all samples have. One that only some have is left out where it is a statistic, else refused."""
    columns: RolloutBatch = {}
    for name in _OPTIONAL:
        if _all_have([s for s in samples if name != "rollout_routed_experts" or _trains(s)], name):
            columns[name] = [getattr(sample, name) for sample in samples]
    if any(sample.train_metadata is not None for sample in samples):
        columns["metadata"] = [sample.train_metadata or {} for sample in samples]
    if any(sample.multimodal_train_inputs for sample in samples):
        columns["multimodal_train_inputs"] = [sample.multimodal_train_inputs for sample in samples]
    if any(sample.weight_versions for sample in samples):
        columns["weight_versions"] = [sample.weight_versions for sample in samples]
    return columns


def _trains(sample: Sample) -> bool:
    """One without a trained token may be without a recording of its experts, too: it was never generated, say."""
    return any(_loss_mask(sample))


def _all_have(samples: Sequence[Sample], name: str) -> bool:
    without = [sample for sample in samples if getattr(sample, name) is None]
    if without and len(without) < len(samples):
        raise NothingToTrain(
            f"{len(without)} of {len(samples)} samples have no {name}",
            evidence=f"the first is sample {without[0].index} of prompt group {without[0].group_index}",
            advice=f"Let the generate function set {name} for all samples, or for none.",
        )
    return not without
