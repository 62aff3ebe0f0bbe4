"""The default rollout function and its parts: state, one sample, one prompt group."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.rollout.base_types import (
    GenerateFnInput,
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnInput,
    RolloutFnOutput,
)
from miles.rollout.engines import Engines, engines
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.hooks import Hook, load_hook
from miles.rollout.inference_rollout.compatibility import check_generate_output, load_generate_function
from miles.rollout.on_policy_distillation import ask_teacher
from miles.rollout.progress import progress_now
from miles.rollout.rm_hub import async_rm, batched_async_rm
from miles.utils.data import Dataset
from miles.utils.http_utils import DEFAULT_RETRIES, RequestFailed
from miles.utils.misc import SingletonMeta
from miles.utils.processing_utils import load_processor, shared_tokenizer
from miles.utils.types import BadSample, Sample, SampleStatus

logger = logging.getLogger(__name__)
DEFAULT_GENERATE = "miles.rollout.generate_hub.single_turn.generate"
STRAGGLER_DEADLINE_S = 60.0
UNASKED_ABORTS = 3
"""How often a request that an engine aborted by itself is made again."""


def compute_sampling_params(
    args: Any, *, temperature: float, top_p: float, top_k: int, max_new_tokens: int | None
) -> dict[str, Any]:
    """Sampling parameters as the engine takes them."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": bool(args.rollout_skip_special_tokens),
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


class GenerateState:
    """What generating needs, and whether it shall stop. Lives on the loop of user code.

    Attributes:
        tokenizer, processor: Of ``--hf-checkpoint``.
        semaphore: Bounds samples under way: ``--sglang-server-concurrency`` per engine.
        sampling_params: Of training samples.
        request_retries: How often a request that no engine answers is repeated.
        straggler_deadline_s: How long samples that shall stop are waited for.
        aborted: No new request shall be made; samples under way come back as ``ABORTED``.
        engine_errors: Requests that no engine answered, so far.
        eval_datasets: Those that were read, by what they were read with: they are evaluated again and again.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.tokenizer = shared_tokenizer(args.hf_checkpoint, args.chat_template_path)
        self.processor = load_processor(args.hf_checkpoint)
        self.semaphore = asyncio.Semaphore(args.sglang_server_concurrency * num_engines(args))
        self.generate_fn_semaphore = self.semaphore
        self.sampling_params = compute_sampling_params(
            args,
            temperature=args.rollout_temperature,
            top_p=args.rollout_top_p,
            top_k=args.rollout_top_k,
            max_new_tokens=args.rollout_max_response_len,
        )
        self.generate_hook = load_generate_function(args.custom_generate_function_path or DEFAULT_GENERATE)
        self.generate_function = self.generate_hook
        self.dynamic_filter = load_hook(args.dynamic_sampling_filter_path, "--dynamic-sampling-filter-path")
        self.engines: Engines = engines
        self.progress = progress_now
        self.weight_version: int | None = None
        self.oldest_version: int | None = None
        self.request_retries = DEFAULT_RETRIES
        self.straggler_deadline_s = STRAGGLER_DEADLINE_S
        self.eval_datasets: dict[tuple[Any, ...], Dataset] = {}
        self._by_path: dict[str, Hook] = {}
        self.reset()

    def reset(self) -> None:
        """As before the first rollout."""
        self.aborted = False
        self.pendings: set[asyncio.Task[Any]] = set()
        self.remaining_batch_size = 0
        self.engine_errors = 0

    def generate_function_for(self, sample: Sample) -> Hook:
        """The sample's own generate function, or that of the flags."""
        path = sample.generate_function_path
        if not path:
            return self.generate_hook
        if path not in self._by_path:
            self._by_path[path] = load_generate_function(path, "Sample.generate_function_path")
        return self._by_path[path]


class SharedGenerateState(GenerateState, metaclass=SingletonMeta):
    """The one of this process: what ``GenerateState(args)`` of ``miles.rollout.sglang_rollout`` gives."""

    @staticmethod
    def adopt(state: GenerateState) -> None:
        """Let it be this one, so that functions that ask for it see whether to stop."""
        SingletonMeta._instances[SharedGenerateState] = state


def num_engines(args: Any) -> int:
    """Engines of the run, at least 1."""
    count = getattr(args, "rollout_num_engines", None)
    return max(1, int(count or int(args.rollout_num_gpus or 1) // int(args.rollout_num_gpus_per_engine or 1)))


@dataclass(frozen=True)
class _Asked:
    """What one sample is generated with."""

    sampling_params: dict[str, Any]
    evaluation: bool


async def generate_and_rm(
    state: GenerateState, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """Complete a sample and give it its reward. One that is complete keeps what it has.

    Returns:
        The sample, or the several that one execution made. ``ABORTED`` ones have no reward.

    Raises:
        HookFailed: User code raised. RequestFailed: no engine answered.
    """
    if sample.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED):
        samples: Sample | list[Sample] = sample
    else:
        async with state.semaphore:
            samples = await _generate(state, sample, _Asked(sampling_params, evaluation))
    # Group rewards are for training only.
    if not (state.args.group_rm and not evaluation):
        await _reward(state.args, samples)
    if not evaluation:
        await ask_teacher(state.args, flat([samples]))
    return samples


async def _generate(state: GenerateState, sample: Sample, asked: _Asked) -> Sample | list[Sample]:
    hook = state.generate_function_for(sample)
    for _ in range(UNASKED_ABORTS):
        if state.aborted:
            sample.status = SampleStatus.ABORTED
            return sample
        before = sample.response_length
        made = await hook(GenerateFnInput(state, sample, dict(asked.sampling_params), asked.evaluation))
        samples = check_generate_output(hook, made)
        state.progress.tokens += sum(s.response_length for s in flat([samples])) - before
        # An engine may abort by itself, as when it pauses: the sample goes on where it was.
        if not isinstance(samples, Sample) or samples.status is not SampleStatus.ABORTED or not hook.is_ours:
            return samples
        sample = samples
    return sample


async def _reward(args: Any, samples: Sample | list[Sample]) -> None:
    need = [s for s in flat([samples]) if s.reward is None]
    if not need or any(s.status is SampleStatus.ABORTED for s in flat([samples])):
        return
    rewards = await batched_async_rm(args, need) if isinstance(samples, list) else [await async_rm(args, need[0])]
    for sample, reward in zip(need, rewards or [], strict=True):
        sample.reward = reward


async def generate_and_rm_group(
    state: GenerateState,
    group: Group,
    sampling_params: dict[str, Any],
    evaluation: bool = False,
    *,
    on_entry: Callable[[], None] | None = None,
) -> Group:
    """Complete the samples of a prompt, side by side. With ``--group-rm`` they get their rewards together.

    ``on_entry`` is called as each of its entries is there.

    Raises:
        HookFailed, RequestFailed: Of the first sample that failed; the others are cancelled.
    """
    params = [_params_of(state.args, sampling_params, i, evaluation=evaluation) for i in range(len(group))]
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(_entry(state, entry, p, evaluation)) for entry, p in zip(group, params, strict=True)
            ]
            for task in running:
                task.add_done_callback(lambda _: on_entry() if on_entry is not None else None)
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    done: Group = [task.result() for task in running]
    if state.args.group_rm and not evaluation:
        samples = flat(done)
        if any(s.reward is None for s in samples) and not any(s.status is SampleStatus.ABORTED for s in samples):
            rewards = await batched_async_rm(state.args, samples)
            for sample, reward in zip(samples, rewards or [], strict=True):
                sample.reward = reward
    return done


async def _entry(state: GenerateState, entry: Any, params: dict[str, Any], evaluation: bool) -> Any:
    """One entry of a group: a sample, or the finished ones of an execution that came back from the buffer."""
    if isinstance(entry, list):
        return entry
    return await generate_and_rm(state, entry, params, evaluation)


def _params_of(args: Any, params: dict[str, Any], place: int, *, evaluation: bool) -> dict[str, Any]:
    if not getattr(args, "sglang_enable_deterministic_inference", False):
        return params
    return {**params, "sampling_seed": args.rollout_seed + place}


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a person has to see: the user's error before that of an engine."""
    leaves = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    return min(leaves, key=lambda error: isinstance(error, RequestFailed))


def is_engine_error(state: GenerateState, error: BaseException) -> bool:
    """Whether the engines are at fault, so that the group can be generated again."""
    return isinstance(error, RequestFailed) and (
        state.engines.owns(str(error.fields.get("url", ""))) or not state.engines.router_url
    )


def need_rewards(args: Any, samples: list[Sample]) -> None:
    """Check that each sample has a reward.

    Raises:
        BadSample: One has none.
    """
    for sample in samples:
        if sample.reward is None:
            raise BadSample(
                f"sample {sample.index} of prompt group {sample.group_index} has no reward",
                evidence=f"its status is {sample.status.value}; the reward is {args.custom_rm_path or args.rm_type}",
                advice="Let the reward function return a number (or a dict with --reward-key) for each sample.",
            )


class InferenceRolloutFn:
    """The default of ``--rollout-function-path``: dynamic sampling on the engines, and evaluation."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        self.data_source = input.data_source
        self.state = GenerateState(input.args)
        SharedGenerateState.adopt(self.state)

    async def __call__(self, input: RolloutFnInput) -> RolloutFnOutput:  # noqa: A002
        """Samples for a rollout, or an evaluation."""
        from miles.rollout.inference_rollout.inference_rollout_eval import evaluate
        from miles.rollout.inference_rollout.inference_rollout_train import TrainRollout

        if isinstance(input, RolloutFnEvalInput):
            return await evaluate(self.state, input.rollout_id)
        self.state.weight_version = input.weight_version
        self.state.oldest_version = input.oldest_version
        return await TrainRollout(self.state, self.data_source, input.rollout_id).run()
