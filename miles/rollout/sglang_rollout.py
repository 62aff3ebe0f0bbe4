"""The function generation of the rollout interface: for user code that is written against it.

The work is that of ``miles.rollout.inference_rollout``; these names take ``args`` where those take a state.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.rollout.base_types import GenerateFnInput, Group, RolloutFnEvalOutput, RolloutFnOutput, RolloutFnTrainOutput
from miles.rollout.data_source import DataSource
from miles.rollout.generate_hub import single_turn
from miles.rollout.generate_utils.generate_endpoint_utils import get_model_url
from miles.rollout.inference_rollout import inference_rollout_common as common
from miles.rollout.inference_rollout.inference_rollout_eval import evaluate
from miles.rollout.inference_rollout.inference_rollout_train import TrainRollout
from miles.utils.async_utils import run
from miles.utils.types import Sample

GenerateState = common.SharedGenerateState

__all__ = [
    "GenerateState", "eval_rollout", "generate", "generate_and_rm", "generate_and_rm_group", "generate_rollout",
    "generate_rollout_async", "get_model_url",
]  # fmt: skip


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Complete a sample with one request."""
    output = await single_turn.generate(GenerateFnInput(GenerateState(args), sample, sampling_params))
    assert isinstance(output.samples, Sample)
    return output.samples


async def generate_and_rm(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """Complete a sample and give it its reward."""
    return await common.generate_and_rm(GenerateState(args), sample, sampling_params, evaluation)


async def generate_and_rm_group(
    args: Namespace, group: Group, sampling_params: dict[str, Any], evaluation: bool = False
) -> Group:
    """Complete the samples of a prompt."""
    return await common.generate_and_rm_group(GenerateState(args), group, sampling_params, evaluation)


async def generate_rollout_async(args: Namespace, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
    """Collect a training rollout."""
    return await TrainRollout(GenerateState(args), data_source, rollout_id).run()


async def eval_rollout(args: Namespace, rollout_id: int) -> RolloutFnEvalOutput:
    """Evaluate the data sets that the flags name."""
    return await evaluate(GenerateState(args), rollout_id)


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnOutput:
    """A rollout or an evaluation, from a function that is not async."""
    if evaluation:
        return run(eval_rollout(args, rollout_id))
    return run(generate_rollout_async(args, rollout_id, data_source))
