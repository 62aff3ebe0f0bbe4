"""Evaluation: all prompts of all evaluation data sets, each with its own sampling parameters."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from typing import Any

from miles.rollout.base_types import RolloutFnEvalOutput
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.inference_rollout.inference_rollout_common import (
    GenerateState,
    compute_sampling_params,
    generate_and_rm,
    need_rewards,
)
from miles.rollout.rewards import eval_reward
from miles.utils.data import Dataset
from miles.utils.eval_config import BadEvalConfig, EvalDatasetConfig, eval_datasets
from miles.utils.http_utils import http_client, request_scope
from miles.utils.types import Sample, SampleStatus

CLEAN_UP_S = 5.0


async def evaluate(state: GenerateState, rollout_id: int) -> RolloutFnEvalOutput:
    """Evaluate the data sets that the flags name.

    Raises:
        HookFailed, RequestFailed, NoDataset and the like.
    """
    request_scope.set(f"eval-{rollout_id}")
    configs = eval_datasets(state.args)
    if state.args.group_rm and configs:
        raise BadEvalConfig(
            "--group-rm and evaluation do not go together",
            evidence="rewards are computed per prompt group; an evaluation has none",
            advice="Leave out --group-rm, or --eval-interval.",
        )
    plans = [(config, await asyncio.to_thread(_samples, state, config)) for config in configs]
    state.progress.begin("evaluate", rollout_id, sum(len(samples) for _, samples in plans))
    try:
        results = await _all(*(_one(state, config, samples) for config, samples in plans))
    finally:
        await _leave(state, f"eval-{rollout_id}")
    return RolloutFnEvalOutput({config.name: data for config, data in zip(configs, results, strict=True)})


async def _leave(state: GenerateState, scope: str) -> None:
    """After a failure or a cancellation, engines still work on requests: they are aborted."""
    rids = http_client().in_flight(scope)
    http_client().forget(scope)
    if rids:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_UP_S):
                await state.engines.abort(rids)


async def _one(state: GenerateState, config: EvalDatasetConfig, samples: list[Sample]) -> dict[str, Any]:
    params = compute_sampling_params(
        state.args,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_response_len,
    )
    params |= {"stop": config.stop, "stop_token_ids": config.stop_token_ids}
    if config.min_new_tokens is not None:
        params["min_new_tokens"] = config.min_new_tokens
    state = _with_context(state, config.max_context_len)
    made = flat(await _all(*(_sample(state, sample, params) for sample in samples)))
    made.sort(key=lambda sample: sample.index or 0)
    need_rewards(state.args, made)
    return {
        "rewards": [eval_reward(state.args, sample) for sample in made],
        "truncated": [s.status is SampleStatus.TRUNCATED for s in made],
        "samples": made,
        "n_samples_per_prompt": config.n_samples_per_eval_prompt,
    }


async def _sample(state: GenerateState, sample: Sample, params: dict[str, Any]) -> Any:
    if getattr(state.args, "sglang_enable_deterministic_inference", False):
        params = {**params, "sampling_seed": state.args.rollout_seed + (sample.index or 0)}
    made = await generate_and_rm(state, sample, params, evaluation=True)
    state.progress.finished += 1
    return made


def _with_context(state: GenerateState, max_context_len: int | None) -> GenerateState:
    """The same state, which no training rollout stops, with another limit for prompt and response."""
    other = copy.copy(state)
    other.aborted = False
    if max_context_len != state.args.rollout_max_context_len:
        other.args = copy.copy(state.args)
        other.args.rollout_max_context_len = max_context_len
    return other


async def _all(*coroutines: Any) -> list[Any]:
    """All results, in order; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _samples(state: GenerateState, config: EvalDatasetConfig) -> list[Sample]:
    samples: list[Sample] = []
    dataset = _dataset(state, config)
    for group in range(len(dataset)):
        for sample in dataset.copies(group, config.n_samples_per_eval_prompt):
            sample.group_index, sample.index = group, len(samples)
            sample.metadata.update(config.metadata_overrides)
            if config.rm_type:
                sample.metadata["rm_type"] = config.rm_type
            if config.custom_generate_function_path:
                sample.generate_function_path = config.custom_generate_function_path
            samples.append(sample)
    return samples


def _dataset(state: GenerateState, config: EvalDatasetConfig) -> Dataset:
    args = state.args
    template = args.apply_chat_template if config.apply_chat_template is None else config.apply_chat_template
    key = (
        config.path, config.input_key, config.label_key, config.tool_key, config.metadata_key,
        config.max_prompt_len, template, args.hf_checkpoint, args.chat_template_path,
    )  # fmt: skip
    known = state.eval_datasets
    if key not in known:
        known[key] = Dataset(
            config.path, state.tokenizer, state.processor if args.multimodal_keys else None, config.max_prompt_len,
            prompt_key=config.input_key, label_key=config.label_key, tool_key=config.tool_key,
            metadata_key=config.metadata_key, multimodal_keys=args.multimodal_keys, apply_chat_template=template,
            apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        )  # fmt: skip
    return known[key]
