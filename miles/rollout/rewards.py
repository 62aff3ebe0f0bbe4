"""Rewards of samples as the trainer gets them: one number each, relative to the others of the prompt where asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from miles.rollout.hooks import load_hook
from miles.utils.types import BadSample, Sample
from miles_agents.errors import ConfigError

GROUP_RELATIVE = ("grpo", "gspo", "reinforce_plus_plus_baseline")


class UnequalSiblings(ConfigError):
    """Samples of one execution have different rewards."""

    code = "E-ROLL-014"


async def post_process_rewards(args: Any, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Raw rewards, and those that advantages are made from.

    ``grpo``, ``gspo`` and ``reinforce_plus_plus_baseline`` subtract the mean over the executions of a prompt; the
    first two also divide by the standard deviation (n - 1) unless ``--disable-grpo-std-normalization``
    (Shao et al. 2024, "DeepSeekMath"; without it, Liu et al. 2025, "Understanding R1-Zero-Like Training").

    Raises:
        BadSample: A reward is no number. UnequalSiblings. HookFailed.
    """
    hook = load_hook(args.custom_reward_post_process_path, "--custom-reward-post-process-path")
    if hook is not None:
        result = await hook(args, samples)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise hook.bad_result(result, "two lists: raw rewards and rewards")
        raw, rewards = list(result[0]), list(result[1])
        if len(raw) != len(samples) or len(rewards) != len(samples):
            raise hook.bad_result(result, f"two lists of {len(samples)} rewards")
        return raw, rewards
    raw = [_number(args, sample) for sample in samples]
    if args.advantage_estimator not in GROUP_RELATIVE or not args.rewards_normalization:
        return raw, list(raw)
    with_std = args.advantage_estimator != "reinforce_plus_plus_baseline" and args.grpo_std_normalization
    return raw, group_relative(raw, prompt_blocks(args, samples), samples, with_std=with_std)


def group_relative(
    raw: Sequence[float], blocks: Sequence[Sequence[int]], samples: Sequence[Sample], *, with_std: bool
) -> list[float]:
    """Rewards relative to their block: minus the mean, over the standard deviation plus 1e-6 if ``with_std``.

    Mean and deviation are those of executions, not of samples.
    """
    result = [0.0] * len(raw)
    for block in blocks:
        by_execution: dict[int, float] = {}
        for i in block:
            execution = execution_of(samples[i], i)
            if by_execution.setdefault(execution, raw[i]) != raw[i]:
                raise UnequalSiblings(
                    f"the samples of execution {execution} have different rewards",
                    evidence=f"{by_execution[execution]} and {raw[i]}, for prompt group {samples[i].group_index}",
                    advice="Give all samples that one execution made its reward, or each a rollout_id of its own.",
                )
        values = np.array(list(by_execution.values()), dtype=np.float64)
        mean = float(values.mean())
        std = float(values.std(ddof=1)) if with_std and len(values) > 1 else 0.0
        for i in block:
            result[i] = (raw[i] - mean) / (std + 1e-6) if std > 0 else raw[i] - mean
    return result


def execution_of(sample: Sample, position: int) -> int:
    """The number of the execution that made a sample."""
    if sample.rollout_id is not None:
        return sample.rollout_id
    return position if sample.index is None else sample.index


def prompt_blocks(args: Any, samples: Sequence[Sample]) -> list[list[int]]:
    """Positions of samples by prompt."""
    if all(sample.group_index is not None for sample in samples):
        found: dict[int, list[int]] = {}
        for i, sample in enumerate(samples):
            found.setdefault(int(sample.group_index or 0), []).append(i)
        return list(found.values())
    n = args.n_samples_per_prompt
    if len(samples) == n * args.rollout_batch_size:
        return [list(range(i, i + n)) for i in range(0, len(samples), n)]
    return [list(range(len(samples)))]


def eval_reward(args: Any, sample: Sample) -> Any:
    """The reward of a sample of an evaluation, or its entry ``--eval-reward-key``. A plain number needs no key.

    Raises:
        BadSample: The reward has no such entry, or several and no key says which one counts.
    """
    key = args.eval_reward_key or args.reward_key
    if not isinstance(sample.reward, dict):
        return sample.reward
    if key in sample.reward:
        return sample.reward[key]
    if key is None and args.custom_eval_rollout_log_function_path:
        return sample.reward  # what to make of it is that function's business
    raise BadSample(
        f"the reward of sample {sample.index} of prompt group {sample.group_index} "
        + (f"has no entry {key!r}" if key else "has several values"),
        evidence=f"it is {str(sample.reward)[:200]}",
        advice="Give --eval-reward-key a key that the reward function of this data set returns.",
    )


def _number(args: Any, sample: Sample) -> float:
    value = sample.get_reward_value(args)
    try:
        number = float(value)
        if math.isfinite(number):
            return number
        raise ValueError("not finite")
    except (TypeError, ValueError) as error:
        hint = " (a dict: give --reward-key)" if isinstance(value, dict) else ""
        raise BadSample(
            f"the reward of sample {sample.index} of prompt group {sample.group_index} is no number",
            evidence=f"it is {str(value)[:200]}{hint}",
            advice="Let the reward function return a number for each sample, or a dict with --reward-key.",
        ) from error
