"""A sample made by an agent: code of the user that talks to an OpenAI-compatible address, which keeps the tokens.

``--custom-generate-function-path miles.rollout.generate_hub.agentic_tool_call.generate``. docs/multi-turn.md is for
those who use it.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
from typing import Any

from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput
from miles.rollout.generate_utils.openai_endpoint_utils import OpenAIEndpointTracer
from miles.rollout.hooks import Hook, load_hook
from miles.utils.misc import CannotLoad, load_function
from miles.utils.types import Sample, SampleStatus

_AGENT = "--custom-agent-function-path"
_LOOK_EVERY_S = 0.2
_GRACE_S = 5.0
_OPENAI = ("temperature", "top_p", "stop")


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002 - the name that tells this form apart
    """Let the agent run. Returns a sample for each run of messages that it asked; they share ``rollout_id``.

    If samples shall stop, the agent is told (``abort(args)`` beside it) and cancelled, and the sample is ``ABORTED``
    with nothing in it: agents do not go on where they were. One that asked nothing leaves a ``FAILED`` sample.

    Raises:
        HookFailed: The agent raised. BadHookResult: it returned neither a dict nor None.
    """
    sample, args = input.sample, input.args
    agent = load_hook(getattr(args, "custom_agent_function_path", None), _AGENT)
    if agent is None:
        raise CannotLoad(
            f"generation by an agent needs {_AGENT}", evidence="it is not given", advice=f"Give {_AGENT}.", flag=_AGENT
        )
    tracer = await OpenAIEndpointTracer.create(
        args, input.sampling_params, routing_key=sample.routing_key, stops=lambda: bool(input.state.aborted)
    )
    try:
        result, done = await _run(agent, tracer.base_url, input)
    finally:
        samples = await tracer.collect_samples()
    if not done:
        sample.reset_for_retry()
        return GenerateFnOutput(samples=sample)
    if result is not None and not isinstance(result, dict):
        raise agent.bad_result(result, "a dict for the sample's metadata, or None")
    made = [_as_sample(sample, part) for part in samples] or [_failed(sample)]
    for one in made:
        _take_result(one, dict(result or {}))
    return GenerateFnOutput(samples=made[0] if len(made) == 1 else made)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this function."""
    parser.add_argument(_AGENT, type=str, default=None, help="async run(base_url, prompt, request_kwargs, metadata)")
    parser.add_argument("--max-seq-len", type=int, default=None, help="most tokens of a conversation of an agent")
    parser.add_argument(
        "--generate-tool-call-parser", type=str, default=None, help="how the model writes calls: a parser of SGLang's"
    )


generate.add_arguments = add_arguments  # type: ignore[attr-defined]


async def _run(agent: Hook, base_url: str, asked: GenerateFnInput) -> tuple[Any, bool]:
    """What the agent returned, and whether it came to its end."""
    params = asked.sampling_params
    request = {name: params[name] for name in _OPENAI if params.get(name) is not None}
    if params.get("max_new_tokens") is not None:
        request["max_tokens"] = params["max_new_tokens"]
    sample = asked.sample
    task = asyncio.ensure_future(
        agent(
            base_url=base_url,
            prompt=copy.deepcopy(sample.prompt),
            request_kwargs=request,
            metadata=copy.deepcopy(sample.metadata),
        )
    )
    try:
        while not task.done():
            if asked.state.aborted:
                await _stop(agent, task, asked.args)
                return None, False
            await asyncio.wait({task}, timeout=_LOOK_EVERY_S)
        if asked.state.aborted and task.exception() is not None:
            return None, False  # its requests were refused for that
        return task.result(), True
    finally:
        task.cancel()


async def _stop(agent: Hook, task: asyncio.Future[Any], args: Any) -> None:
    """Tell the agent, then cancel it; one that does not let itself be cancelled is not waited for."""
    module = agent.path.rpartition(".")[0]
    try:
        abort = Hook(_AGENT, f"{module}.abort", load_function(f"{module}.abort"))
    except CannotLoad:
        abort = None
    if abort is not None:
        await abort(args)
    task.cancel()
    await asyncio.wait({task}, timeout=_GRACE_S)
    if task.done() and not task.cancelled():
        task.exception()  # what it raised on the way out is nobody's


def _as_sample(asked: Sample, part: Sample) -> Sample:
    """The sample that was asked for, with these tokens."""
    made = copy.deepcopy(asked)
    for name in (
        "tokens", "response", "response_length", "loss_mask", "rollout_log_probs", "weight_versions", "status",
        "spec_info", "prefix_cache_info", "rollout_routed_experts", "rollout_indexer_topk",
    ):  # fmt: skip
        setattr(made, name, getattr(part, name))
    made.rollout_id = asked.rollout_id if asked.rollout_id is not None else asked.index
    made.metadata["round_number"] = len(part.weight_versions)
    return made


def _failed(asked: Sample) -> Sample:
    made = copy.deepcopy(asked)
    made.status, made.remove_sample = SampleStatus.FAILED, True
    made.loss_mask, made.rollout_log_probs = [], []
    return made


def _take_result(sample: Sample, result: dict[str, Any]) -> None:
    if "reward" in result:
        sample.reward = result.pop("reward")
    sample.metadata.update(result)
