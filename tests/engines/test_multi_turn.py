"""Tools with the real engine: its parser, and its requests turn after turn."""

import re
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from support.engines import KEY
from support.rollout_cases import make_args
from support.tool_cases import PARSED, TOOLS, call, parse_qwen

from miles.backends.sglang_utils.client import EngineClient
from miles.rollout.base_types import GenerateFnInput
from miles.rollout.engines import engines
from miles.rollout.generate_hub import agentic_tool_call
from miles.rollout.generate_hub.multi_turn import generate
from miles.rollout.generate_utils.openai_endpoint_utils import close_agent_server
from miles.rollout.generate_utils.tool_call_utils import BadTools, ToolCallParser, create_tool_call_parser
from miles.rollout.hooks import close_hook_pool
from miles.rollout.inference_rollout.inference_rollout_common import GenerateState
from miles.utils.http_utils import close_http_client
from miles.utils.misc import function_registry
from miles.utils.types import Sample

pytestmark = pytest.mark.full
PAGE = Path(__file__).parents[2] / "docs" / "multi-turn.md"


@pytest.fixture
def served(warm_engine):
    """The session's engine as the only one of this process's rollout."""
    engines.set([warm_engine.target], warm_engine.url, KEY)
    yield warm_engine
    close_agent_server()
    close_http_client()
    close_hook_pool()


async def test_calls_are_found_as_the_scripted_engine_finds_them(served):
    parser = create_tool_call_parser(TOOLS, "qwen25")
    for text, rest, _ in PARSED:
        parsed = await parser.parse(text)
        if rest is None:
            assert parsed.unreadable, text
            continue
        told = parse_qwen(text, TOOLS)
        assert parsed.text == told["normal_text"] == rest, text
        assert [(c.name, c.arguments) for c in parsed.calls] == [(c["name"], c["parameters"]) for c in told["calls"]]
    assert parser.parse_non_stream(call("add", a=1))[1][0].name == "add"
    with pytest.raises(BadTools, match="no_such_parser is no parser"):
        await ToolCallParser(TOOLS, "no_such_parser").parse("text")


@asynccontextmanager
async def wishes(engine):
    """In front of the engine's parser: a random model calls no tool, so a call is added to whatever it says."""

    async def parse(request):
        body = await request.json()
        body["text"] += call("add", a=1, b=1)
        headers = {"Authorization": request.headers["Authorization"]}
        async with (
            ClientSession() as session,
            session.post(engine.url + "/parse_function_call", json=body, headers=headers) as answer,
        ):
            return web.json_response(await answer.json(), status=answer.status)

    app = web.Application()
    app.router.add_post("/parse_function_call", parse)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_turns_of_the_real_engine_are_one_sequence(served):
    """What was sent and made is what lies in the sample: the engine scores the whole as it did each turn."""
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    args = make_args(
        hf_checkpoint=str(served.model), generate_max_turns=3, generate_tool_call_parser="qwen25",
        generate_tool_specs_path="support.tool_cases.TOOLS", rollout_max_response_len=64,
        generate_execute_tool_function_path="support.tool_cases.execute", rollout_stop_token_ids=list(range(0, 320, 2)),
    )  # fmt: skip
    args.sglang_router_ip, args.sglang_router_port = host, int(port)
    async with wishes(served) as url, EngineClient(served.url, KEY) as client:
        engines.set([replace(served.target, url=url)], served.url, KEY)
        state = GenerateState(args)
        sample = Sample(prompt="2+2?", index=0)
        sample = (await generate(GenerateFnInput(state, sample, state.sampling_params))).samples
        scored = await client.generate(sample.tokens, {"max_new_tokens": 1}, logprob_start_len=0)
    assert sample.status is Sample.Status.TRUNCATED and sample.metadata["round_number"] == 3
    assert sample.weight_versions == ["default"] * 3 and sample.metadata["tool_errors"] == 0
    is_scored_alike(sample, scored, answers=3)


def is_scored_alike(sample, scored, *, answers):
    """The model's own tokens have the log-probs that the engine gives them in the whole."""
    sample.validate()
    scores = [score for score, *_ in scored["meta_info"]["input_token_logprobs"]][-sample.response_length :]
    stretches = "".join(str(counts) for counts in sample.loss_mask)
    assert len([part for part in stretches.split("0") if part]) == answers
    for counts, told, score in zip(sample.loss_mask, sample.rollout_log_probs, scores, strict=True):
        assert told == (pytest.approx(score, abs=1e-4) if counts else 0.0)


async def test_the_agent_of_the_page_talks_to_the_real_engine(served):
    code = re.search(r"```python\n(from openai.*?)```", PAGE.read_text(), re.DOTALL)
    agent = {}
    exec(compile(code[1], str(PAGE), "exec"), agent)
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    args = make_args(
        hf_checkpoint=str(served.model), custom_agent_function_path="tests.page.run", rollout_max_response_len=40
    )
    args.sglang_router_ip, args.sglang_router_port = host, int(port)
    sample = Sample(prompt=[{"role": "user", "content": "2+2?"}], index=0)
    with function_registry.temporary("tests.page.run", agent["run"]):
        state = GenerateState(args)
        sample = (await agentic_tool_call.generate(GenerateFnInput(state, sample, state.sampling_params))).samples
    async with EngineClient(served.url, KEY) as client:
        scored = await client.generate(sample.tokens, {"max_new_tokens": 1}, logprob_start_len=0)
    assert sample.metadata["round_number"] == 2 and "last_words" in sample.metadata
    assert sample.weight_versions == ["default"] * 2
    is_scored_alike(sample, scored, answers=2)
