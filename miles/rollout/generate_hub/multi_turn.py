"""A sample in several turns: the model answers, tools do what it calls, it reads their results and answers again.

``--custom-generate-function-path miles.rollout.generate_hub.multi_turn.generate``. The tokens of the model stay as it
made them: each request is the tokens so far, results of tools are appended with loss mask 0. docs/multi-turn.md is for
those who use it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample,
    compute_request_payload,
    generate_url,
    update_sample_from_response,
)
from miles.rollout.generate_utils.tool_call_utils import (
    TOOL_TIMEOUT_S,
    BadTools,
    ToolCallParser,
    ToolsStopped,
    checked_tools,
    execute_tool_calls,
    is_error,
    stop_text,
    unreadable_message,
    update_sample_with_tool_responses,
)
from miles.rollout.hooks import Hook, load_hook
from miles.utils.http_utils import post
from miles.utils.misc import load_function
from miles.utils.types import SampleStatus

MAX_TURNS = 16
_SPECS, _PARSER = "--generate-tool-specs-path", "--generate-tool-call-parser"
_EXECUTE = "--generate-execute-tool-function-path"
UNFINISHED = "multi_turn"
"""Key of ``Sample.metadata`` while a sample is not finished: how far it got."""
TOOL_CALLS, TOOL_ERRORS = "tool_calls", "tool_errors"
"""Keys of ``Sample.metadata``: how many there were."""


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002 - the name that tells this form apart
    """Complete a sample; one that was aborted goes on where it was.

    It ends ``COMPLETED`` with an answer without a tool call, ``TRUNCATED`` at the most tokens of an answer or of the
    whole, or after the last turn that there is if that has a call, ``ABORTED`` if samples shall stop.
    """
    run = _Run(input, _tools_of(input))
    if not run.sample.response_length:
        run.begin()
    while await run.answer() and await run.use_tools():
        pass
    return GenerateFnOutput(samples=run.sample)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this function."""
    parser.add_argument("--generate-max-turns", type=int, default=MAX_TURNS, help="most answers of one sample")
    parser.add_argument(_SPECS, type=str, default=None, help="list of tools, as package.module.name")
    parser.add_argument(_PARSER, type=str, default=None, help="how the model writes calls: a parser of SGLang's")
    parser.add_argument(_EXECUTE, type=str, default=None, help="async fn(name, arguments) -> str that makes a call")
    parser.add_argument(
        "--generate-tool-timeout", type=float, default=TOOL_TIMEOUT_S, help="seconds that one call may take"
    )


generate.add_arguments = add_arguments  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Tools:
    """What a sample may call; ``parser`` is None if there is nothing."""

    specs: list[dict[str, Any]]
    parser: ToolCallParser | None
    execute: Hook | None
    timeout_s: float
    max_turns: int

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.specs]


def _tools_of(asked: GenerateFnInput) -> _Tools:
    """Raises BadTools."""
    args = asked.args
    path, parser = getattr(args, "generate_tool_specs_path", None), getattr(args, "generate_tool_call_parser", None)
    specs = load_function(path, flag=_SPECS) if path else asked.sample.metadata.get("tools")
    execute = load_hook(getattr(args, "generate_execute_tool_function_path", None), _EXECUTE)
    timeout_s = float(getattr(args, "generate_tool_timeout", TOOL_TIMEOUT_S))
    max_turns = int(getattr(args, "generate_max_turns", MAX_TURNS))
    if not specs:
        return _Tools([], None, None, timeout_s, max_turns)
    tools = checked_tools(specs, f"{_SPECS} {path}" if path else "the column of tools")
    if not parser or execute is None:
        missing = ", ".join(flag for flag, there in ((_PARSER, parser), (_EXECUTE, execute)) if not there)
        raise BadTools(
            f"there are tools, and no {missing}",
            evidence=f"tools: {', '.join(tool['function']['name'] for tool in tools)}",
            advice=f"Give {missing}, too.",
        )
    return _Tools(tools, ToolCallParser(tools, parser), execute, timeout_s, max_turns)


class _Run:
    """One call of ``generate``.

    How far a sample got lies in its metadata, so that it can go on elsewhere: ``turns`` that were begun, the place in
    ``tokens`` at which the answer of the last one ``starts``, and whether it has ``ended``.
    """

    def __init__(self, asked: GenerateFnInput, tools: _Tools) -> None:
        self.args, self.state, self.sample = asked.args, asked.state, asked.sample
        self._params = asked.sampling_params
        self._tools = tools
        kept = self.sample.metadata.get(UNFINISHED) or {}
        self._turns = int(kept.get("turns", 1))
        self._starts = int(kept.get("starts", len(self.sample.tokens) - self.sample.response_length))
        self._ended = bool(kept.get("ended", False))
        self._max_tokens: int | None = self.args.rollout_max_context_len

    def begin(self) -> None:
        """The prompt, in tokens."""
        sample = self.sample
        sample.tokens = compute_prompt_ids_from_sample(self.state, sample, tools=self._tools.specs or None)
        sample.loss_mask, sample.rollout_log_probs = [], []
        self._turns, self._starts, self._ended = 1, len(sample.tokens), False
        for key in (TOOL_CALLS, TOOL_ERRORS):
            sample.metadata.pop(key, None)

    async def answer(self) -> bool:
        """Let the model say something. Returns whether it came to an end by itself."""
        if self._ended:
            return True
        sample = self.sample
        payload, status = compute_request_payload(
            self.args,
            list(sample.tokens),
            self._params,
            generated=len(sample.tokens) - self._starts,
            multimodal_inputs=sample.multimodal_inputs,
        )
        if payload is None:
            assert status is not None
            return self._over(status)
        headers = {"X-SMG-Routing-Key": sample.routing_key} if sample.routing_key else None
        output = await post(generate_url(self.args), payload, max_retries=self.state.request_retries, headers=headers)
        update_sample_from_response(
            self.args, sample, payload, output, tokenizer=self.state.tokenizer, update_loss_mask=True
        )
        self._ended = sample.status is SampleStatus.COMPLETED
        return self._ended or self._over(sample.status)

    async def use_tools(self) -> bool:
        """Do what the last answer asks for. Returns whether there is to be another one."""
        tools, sample = self._tools, self.sample
        if tools.parser is None or tools.execute is None:
            return self._over(SampleStatus.COMPLETED)
        parsed = await tools.parser.parse(self._answer_text())
        if not parsed.calls and not parsed.unreadable:
            return self._over(SampleStatus.COMPLETED)
        if self._turns >= tools.max_turns:
            return self._over(SampleStatus.TRUNCATED)
        start = time.monotonic()
        try:
            messages = await execute_tool_calls(
                parsed.calls, tools.execute, known=tools.names, timeout_s=tools.timeout_s, stops=self._stops
            )
        except ToolsStopped:
            return self._over(SampleStatus.ABORTED)
        finally:
            sample.non_generation_time += time.monotonic() - start
        return self._read(messages or [unreadable_message(tools.names)])

    def _read(self, messages: list[dict[str, Any]]) -> bool:
        """Append what the tools said, and begin the next turn. Returns whether there is room for it."""
        sample = self.sample
        failed = sum(map(is_error, messages))
        for key, more in ((TOOL_CALLS, len(messages)), (TOOL_ERRORS, failed)):
            sample.metadata[key] = sample.metadata.get(key, 0) + more
        left_out = update_sample_with_tool_responses(
            sample,
            messages,
            self.state.tokenizer,
            tools=self._tools.specs,
            template_kwargs=self.args.apply_chat_template_kwargs,
            max_tokens=self._max_tokens,
        )
        if left_out:
            return self._over(SampleStatus.TRUNCATED)
        self._turns, self._starts, self._ended = self._turns + 1, len(sample.tokens), False
        return not self._stops() or self._over(SampleStatus.ABORTED)

    def _answer_text(self) -> str:
        """What the model said in this turn, without the token that ends it."""
        ids = self.sample.tokens[self._starts :]
        if stop_text(self.sample, self.state.tokenizer) is not None:
            ids = ids[:-1]
        return str(self.state.tokenizer.decode(ids, skip_special_tokens=False))

    def _stops(self) -> bool:
        return bool(self.state.aborted)

    def _over(self, status: SampleStatus) -> bool:
        """The sample leaves like this. Returns False."""
        self.sample.status = status
        self.sample.metadata["round_number"] = self._turns
        if status is SampleStatus.ABORTED:
            kept = {"turns": self._turns, "starts": self._starts, "ended": self._ended}
            self.sample.metadata[UNFINISHED] = kept
        else:
            self.sample.metadata.pop(UNFINISHED, None)
        return False
