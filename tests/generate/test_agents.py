"""Agents: what they ask of the address, and the samples that come of it."""

import argparse
import asyncio
import itertools
import json

import pytest
from aiohttp import ClientSession
from support.flag_cases import FACTS
from support.procs import eventually
from support.rollout_cases import Answer, ids_of, text_of
from support.tiny_models import IM_END_ID
from support.tool_cases import TOOLS, call, tool_servers, tool_state

from miles.flags.parse import parse
from miles.flags.resolve import resolve
from miles.flags.table import table
from miles.rollout.base_types import GenerateFnInput
from miles.rollout.engines import engines
from miles.rollout.generate_hub import agentic_tool_call
from miles.rollout.generate_hub.agentic_tool_call import generate
from miles.rollout.generate_utils.openai_endpoint_utils import OpenAIEndpointTracer, close_agent_server
from miles.rollout.hooks import BadHookResult, HookFailed
from miles.utils.http_utils import request_scope
from miles.utils.misc import CannotLoad, function_registry
from miles.utils.types import Sample

USER = {"role": "user", "content": "2+2?"}
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
ANSWERS = "<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def _server_ends():
    yield
    close_agent_server()


def script(*answers):
    left = [answer if isinstance(answer, Answer) else Answer(answer) for answer in answers]
    return lambda payload, prompt: left.pop(0)


async def asks(base_url, messages, *, status=200, **more):
    """As an agent's client does."""
    body = {"model": "any", "messages": messages, **more}
    async with ClientSession() as session, session.post(f"{base_url}/v1/chat/completions", json=body) as answer:
        told = await answer.json()
        assert answer.status == status, told
        return told["error"]["message"] if status != 200 else told


async def said_to(base_url, messages, **more):
    """The answer's message."""
    return (await asks(base_url, messages, **more))["choices"][0]["message"]


async def made(servers, agent, *, state=None, sample=None, **flags):
    with function_registry.temporary("tests.agents.run", agent):
        state = state or tool_state(servers, custom_agent_function_path="tests.agents.run", **flags)
        sample = sample or Sample(prompt=[USER], index=5, label="4", metadata={"kept": 1})
        out = (await generate(GenerateFnInput(state, sample, dict(state.sampling_params)))).samples
    for one in out if isinstance(out, list) else [out]:
        one.validate()
    return out


async def test_a_conversation_is_one_sequence_of_tokens():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        assert prompt == [USER] and metadata == {"kept": 1} and request_kwargs["max_tokens"] == 256
        messages = [*prompt]
        first = await said_to(base_url, messages, **request_kwargs)
        messages += [first, {"role": "user", "content": "sure?"}]
        whole = await asks(base_url, messages, **request_kwargs)
        assert whole["choices"][0]["finish_reason"] == "stop" and whole["usage"]["completion_tokens"] == 4
        return {"reward": 0.5, "seen": whole["choices"][0]["message"]["content"]}

    with tool_servers(script("It is 4.", "yes")) as servers:
        sample = await made(servers, agent)
    first, last = [*ids_of("It is 4."), IM_END_ID], [*ids_of("yes"), IM_END_ID]
    between = ids_of("\n" + TURN.format("user", "sure?") + ANSWERS)
    assert sample.tokens == ids_of(TURN.format("user", "2+2?") + ANSWERS) + first + between + last
    assert sample.loss_mask == [1] * len(first) + [0] * len(between) + [1] * len(last)
    assert all((p == 0.0) == (not m) for p, m in zip(sample.rollout_log_probs, sample.loss_mask, strict=True))
    assert (sample.status, sample.reward, sample.label, sample.index) == (Sample.Status.COMPLETED, 0.5, "4", 5)
    assert sample.metadata == {"kept": 1, "seen": "yes", "round_number": 2}
    assert [request["input_ids"] for request in servers.requests][1] == sample.tokens[: -len(last)]
    assert len({head["X-SMG-Routing-Key"] for head in servers.engines[0].headers}) == 1


async def test_tools_that_the_agent_names_are_found_and_their_results_read():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        first = await asks(base_url, prompt, tools=TOOLS)
        message = first["choices"][0]["message"]
        assert first["choices"][0]["finish_reason"] == "tool_calls" and message["content"] == "I add."
        made_call = message["tool_calls"][0]
        assert made_call["function"] == {"name": "add", "arguments": '{"a": 2, "b": 2}'}
        result = {"role": "tool", "tool_call_id": made_call["id"], "name": "add", "content": "4"}
        # Clients fill in fields that say nothing.
        await asks(base_url, [*prompt, {**message, "refusal": None}, result], tools=TOOLS)

    with tool_servers(script("I add.\n" + call("add", a=2, b=2), "It is 4.")) as servers:
        sample = await made(servers, agent)
    assert isinstance(sample, Sample), "one sequence"
    assert sample.response.endswith("<|im_end|>\n" + TURN.format("tool", "4") + ANSWERS + "It is 4.<|im_end|>")


async def test_messages_that_do_not_go_on_are_a_sample_of_their_own():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        for question in ("a", "b", "c"):
            first = await said_to(base_url, [{"role": "user", "content": question}])
        edited = {**first, "content": "something else"}
        await said_to(base_url, [{"role": "user", "content": "c"}, edited, {"role": "user", "content": "d"}])
        return {"reward": 1.0}

    with tool_servers(script("1", "2", "3", "4")) as servers:
        samples = await made(servers, agent)
    assert [text_of(s.tokens[len(s.tokens) - s.response_length :]) for s in samples] == ["1", "2", "3", "4"]
    assert {(s.rollout_id, s.reward, s.index) for s in samples} == {(5, 1.0, 5)}


async def test_requests_that_cannot_be_are_refused_and_leave_no_trace():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        assert "streaming" in await asks(base_url, prompt, status=400, stream=True)
        assert "n is 1" in await asks(base_url, prompt, status=400, n=2)
        assert "no list" in await asks(base_url, "hello", status=400)
        assert "no list of tools" in await asks(base_url, prompt, status=400, tools=[{"name": "x"}])
        first = await said_to(base_url, prompt)
        longer = [*prompt, first, {"role": "user", "content": "and?"}]
        assert "odd parameter" in await asks(base_url, longer, status=400)
        await said_to(base_url, longer)
        await asks(base_url.rpartition("/")[0] + "/guessed", prompt, status=404)

    bad = Answer(status=400, body="odd parameter")
    with tool_servers(script("4", bad, "done")) as servers:
        sample = await made(servers, agent)
    assert sample.response == "4<|im_end|>\n" + TURN.format("user", "and?") + ANSWERS + "done<|im_end|>"


ASSISTANT = {"role": "assistant", "content": ""}
MALFORMED = [
    ([1], "the body is no JSON object"),
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    ({"messages": ["hello"]}, "messages is no list of messages"),
    ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1] has neither content nor tool_calls"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0]: content is neither text nor a list of parts"),
    ({"messages": [ASSISTANT | {"tool_calls": 1}]}, "messages[0]: tool_calls is no list"),
    ({"messages": [ASSISTANT | {"tool_calls": [{"id": "a"}]}]}, "tool_calls[0] has no function with a name"),
    ({"messages": [ASSISTANT | {"tool_calls": ["add"]}]}, "tool_calls[0] has no function with a name"),
    ({"messages": [ASSISTANT | {"tool_calls": [{"function": {"name": "a", "arguments": 1}}]}]}, "arguments"),
    ({"messages": [USER], "max_tokens": "x"}, "max_tokens is no whole number of tokens: 'x'"),
    ({"messages": [USER], "max_completion_tokens": -1}, "max_completion_tokens is no whole number of tokens: -1"),
    ({"messages": [USER], "max_tokens": True}, "max_tokens is no whole number"),
    ({"messages": [USER], "tools": "add"}, "no list of tools"),
]


async def test_what_is_malformed_is_refused_with_what_is_wrong():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        async with ClientSession(headers={"Content-Type": "application/json"}) as session:
            for body, wrong in MALFORMED:
                data = body if isinstance(body, bytes) else json.dumps(body)
                async with session.post(f"{base_url}/v1/chat/completions", data=data) as answer:
                    assert answer.status == 400, await answer.text()
                    assert wrong in (await answer.json())["error"]["message"]
        await said_to(base_url, [USER], max_tokens=None)

    with tool_servers(script("4")) as servers:
        assert (await made(servers, agent)).response == "4<|im_end|>"


async def test_an_answer_that_an_engine_gave_up_goes_on():
    count = itertools.count()

    def answers(payload, prompt):
        return Answer("It is", hangs_after=3) if next(count) == 0 else Answer("is 4.")

    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        asked = asyncio.create_task(said_to(base_url, prompt))
        await eventually(lambda: servers.engines[0].running)
        await engines.abort(list(servers.engines[0].running))
        assert (await asked)["content"] == "It is 4."

    with tool_servers(answers) as servers:
        sample = await made(servers, agent)
    assert sample.response == "It is 4.<|im_end|>" and len(sample.weight_versions) == 2


async def test_the_conversation_has_at_most_so_many_tokens():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        reasons.append((await asks(base_url, prompt))["choices"][0]["finish_reason"])

    reasons = []
    with tool_servers(script("x" * 50)) as servers:
        sample = await made(servers, agent, max_seq_len=60)
    assert sample.status is Sample.Status.TRUNCATED and len(sample.tokens) == 60 and reasons == ["length"]


@pytest.mark.parametrize("stubborn", [False, True])
async def test_an_agent_is_stopped_with_the_samples(stubborn):
    started = asyncio.Event()

    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        await said_to(base_url, prompt)
        started.set()
        await (said_to(base_url, [USER, USER]) if stubborn else asyncio.Event().wait())

    told = []

    async def abort(args):
        told.append(args.custom_agent_function_path)

    scope = request_scope.set("train-0")
    with (
        tool_servers(
            lambda payload, prompt: Answer("4", hangs_after=1 if prompt.count("2+2") > 1 else None)
        ) as servers,
        function_registry.temporary("tests.agents.abort", abort),
    ):
        state = tool_state(servers, custom_agent_function_path="tests.agents.run")
        task = asyncio.create_task(made(servers, agent, state=state))
        await started.wait()
        if stubborn:
            await eventually(lambda: servers.engines[0].running)
        state.aborted = True
        if stubborn:
            await engines.abort_all("train-0")
        sample = await task
    request_scope.reset(scope)
    assert sample.status is Sample.Status.ABORTED and sample.tokens == [] and sample.metadata["kept"] == 1
    assert stubborn or told == ["tests.agents.run"]


async def test_one_that_asks_nothing_leaves_a_sample_that_is_not_trained_on():
    async def agent(base_url, prompt, request_kwargs, metadata, **_):
        return None

    with tool_servers(script()) as servers:
        sample = await made(servers, agent)
    assert sample.status is Sample.Status.FAILED and sample.remove_sample and sample.response_length == 0


async def test_one_that_raises_or_returns_nonsense_is_the_users_error():
    async def raises(base_url, **_):
        raise KeyError("mine")

    async def nonsense(base_url, **_):
        return "text"

    with tool_servers(script()) as servers:
        with pytest.raises(HookFailed, match="mine"):
            await made(servers, raises)
        with pytest.raises(BadHookResult, match="a dict"):
            await made(servers, nonsense)
        with pytest.raises(CannotLoad, match="needs --custom-agent-function-path"):
            await generate(GenerateFnInput(tool_state(servers), Sample(), {}))


async def test_a_session_is_gone_when_its_samples_are_taken():
    with tool_servers(script("4")) as servers:
        tracer = await OpenAIEndpointTracer.create(tool_state(servers).args, {"max_new_tokens": 9})
        await said_to(tracer.base_url, [USER])
        assert [sample.response for sample in await tracer.collect_samples()] == ["4<|im_end|>"]
        await asks(tracer.base_url, [USER], status=404)
        assert await tracer.collect_samples() == []


RECIPE = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
    "--rm-type math --actor-num-gpus-per-node 2 "
    "--custom-generate-function-path miles.rollout.generate_hub.agentic_tool_call.generate"
)


@pytest.mark.parametrize(
    ("flags", "flag", "why"),
    [
        ("", "--custom-agent-function-path", "it is missing"),
        ("--custom-agent-function-path a.run --max-seq-len 1", "--max-seq-len", "is too small"),
        ("--custom-agent-function-path a.run --max-seq-len 100", "", ""),
    ],
)
def test_flags(flags, flag, why):
    parsed = parse(f"{RECIPE} {flags}".split(), table(), [generate.add_arguments])
    told = {problem.flag: problem.what for problem in resolve(parsed, table(), FACTS).problems}
    assert told == ({flag: why} if flag else {})
    parser = argparse.ArgumentParser()
    agentic_tool_call.add_arguments(parser)
    assert vars(parser.parse_args([]))["max_seq_len"] is None
