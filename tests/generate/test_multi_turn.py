"""Generation in several turns against an engine that says what a script says."""

import asyncio
import json

import pytest
from support.procs import eventually
from support.rollout_cases import Answer, ids_of, text_of
from support.tiny_models import IM_END_ID
from support.tool_cases import CALLS, TOOLS, call, tool_servers, tool_state

from miles.rollout.base_types import GenerateFnInput
from miles.rollout.engines import engines
from miles.rollout.generate_hub import multi_turn
from miles.rollout.generate_hub.multi_turn import UNFINISHED, generate
from miles.rollout.generate_utils.tool_call_utils import BadTools
from miles.rollout.inference_rollout.inference_rollout_common import compute_sampling_params, generate_and_rm
from miles.utils.http_utils import RequestFailed, RequestRefused
from miles.utils.misc import CannotLoad, function_registry
from miles.utils.types import Sample

NO_OBJECT = '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>'
UNREADABLE = "error: the tool call is not valid JSON, or names no tool; there are: add, search"
TURN = "<|im_end|>\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"


def script(*answers):
    """One after the other, whatever is asked."""
    left = [answer if isinstance(answer, Answer) else Answer(answer) for answer in answers]
    return lambda payload, prompt: left.pop(0)


async def made(servers, *, sample=None, state=None, **flags):
    """A sample, generated."""
    state = state or tool_state(servers, **flags)
    args = state.args
    params = compute_sampling_params(
        args, temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=args.rollout_max_response_len
    )
    sample = sample or Sample(prompt="2+2?", index=0)
    out = await generate(GenerateFnInput(state, sample, params))
    out.samples.validate()
    return out.samples


def of_model(sample):
    """The tokens that count for the loss."""
    start = len(sample.tokens) - sample.response_length
    return [token for token, counts in zip(sample.tokens[start:], sample.loss_mask, strict=True) if counts]


async def test_a_tool_is_called_and_its_result_read():
    first = "I add.\n" + call("add", a=2, b=2)
    with tool_servers(script(first, "It is 4.")) as servers:
        sample = await made(servers)
    assert sample.status is Sample.Status.COMPLETED
    assert sample.response == first + TURN.format(4) + "It is 4.<|im_end|>"
    model, tool = [*ids_of(first), IM_END_ID], ids_of(TURN.format(4))[1:]
    last = [*ids_of("It is 4."), IM_END_ID]
    assert sample.tokens == ids_of("2+2?") + model + tool + last
    assert sample.loss_mask == [1] * len(model) + [0] * len(tool) + [1] * len(last)
    assert of_model(sample) == model + last
    for probability, token, counts in zip(sample.rollout_log_probs, model + tool + last, sample.loss_mask, strict=True):
        assert probability == (-token / 1000 if counts else 0.0)
    assert sample.weight_versions == ["1", "1"]
    assert {key: sample.metadata[key] for key in ("round_number", "tool_calls", "tool_errors")} == {
        "round_number": 2, "tool_calls": 1, "tool_errors": 0,
    }  # fmt: skip
    assert UNFINISHED not in sample.metadata and sample.non_generation_time > 0
    assert [request["input_ids"] for request in servers.requests] == [ids_of("2+2?"), ids_of("2+2?") + model + tool]


async def test_each_turn_has_the_weight_version_of_its_answer():
    def answers(payload, prompt):
        servers.engines[0].version = "2" if "tool" in prompt else "1"
        return Answer("done" if "tool" in prompt else call("add", a=1, b=1))

    with tool_servers(answers) as servers:
        assert (await made(servers)).weight_versions == ["1", "2"]


async def test_several_calls_of_an_answer_are_made_at_once():
    both = asyncio.Barrier(2)

    async def meets(name, arguments):
        async with asyncio.timeout(5.0):
            await both.wait()
        return {"of": arguments["a"]}

    two = script(call("add", a=1) + "\n" + call("add", a=2), "ok")
    with tool_servers(two) as servers, function_registry.temporary("tests.meets", meets):
        sample = await made(servers, generate_execute_tool_function_path="tests.meets")
    assert '<|im_start|>tool\n{"of": 1}<|im_end|>\n<|im_start|>tool\n{"of": 2}<|im_end|>\n' in sample.response


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("<tool_call>\n{broken\n</tool_call>", UNREADABLE),
        (call("delete"), UNREADABLE),
        ("<tool_call>\n[1]\n</tool_call>", UNREADABLE),
        (call("search"), "error: LookupError: nothing found"),
        (call("add", a=1), "error: KeyError: 'b'"),
        (NO_OBJECT, "error: the arguments of add are not a JSON object"),
    ],
)
async def test_what_goes_wrong_is_told_to_the_model(said, why):
    with tool_servers(script(said, "sorry")) as servers:
        sample = await made(servers)
    assert sample.response == said + TURN.format(why) + "sorry<|im_end|>"
    assert sample.status is Sample.Status.COMPLETED and sample.metadata["tool_errors"] == 1


async def hangs(name, arguments):
    """And does not let itself be cancelled."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            CALLS.append("cancelled")
            if len(CALLS) > 1:
                raise


def blocks(name, arguments):
    """An ordinary function: runs in the pool."""
    return name + json.dumps(arguments)


async def test_a_tool_that_hangs_is_given_up():
    CALLS.clear()
    with tool_servers(script(call("add", a=1), "ok")) as servers, function_registry.temporary("tests.hangs", hangs):
        sample = await made(servers, generate_execute_tool_function_path="tests.hangs", generate_tool_timeout=0.2)
    assert "error: add was not done within 0.2 s" in sample.response and sample.metadata["tool_errors"] == 1


async def test_an_ordinary_function_can_be_the_tool():
    with tool_servers(script(call("add", a=1), "ok")) as servers, function_registry.temporary("tests.blocks", blocks):
        sample = await made(servers, generate_execute_tool_function_path="tests.blocks")
    assert 'add{"a": 1}' in sample.response


async def test_the_last_turn_that_there_is_makes_no_more_calls():
    with tool_servers(lambda payload, prompt: Answer(call("add", a=1, b=1))) as servers:
        sample = await made(servers, generate_max_turns=3)
    assert sample.status is Sample.Status.TRUNCATED
    assert len(servers.requests) == 3 and sample.metadata["round_number"] == 3 and sample.metadata["tool_calls"] == 2
    assert sample.response.endswith("</tool_call><|im_end|>")


async def test_an_answer_that_is_too_long_ends_it():
    with tool_servers(script(call("add", a=1, b=1), "x" * 50)) as servers:
        sample = await made(servers, rollout_max_response_len=80)
    assert sample.status is Sample.Status.COMPLETED, "80 are for each answer"
    with tool_servers(script(call("add", a=1, b=1))) as servers:
        sample = await made(servers, rollout_max_response_len=20)
    assert sample.status is Sample.Status.TRUNCATED and sample.response_length == 20
    assert servers.engines[0].parses == 0 and "tool_calls" not in sample.metadata


async def test_the_context_bounds_answers_and_results():
    said = call("add", a=1, b=1)
    used = len(ids_of("2+2?" + said)) + 1
    with tool_servers(script(said, "x" * 200)) as servers:
        sample = await made(servers, rollout_max_context_len=used + 60)
    assert sample.status is Sample.Status.TRUNCATED and len(sample.tokens) == used + 60
    with tool_servers(script(said)) as servers:
        sample = await made(servers, rollout_max_context_len=used + 10)
    assert sample.status is Sample.Status.TRUNCATED and len(sample.tokens) == used + 10
    assert len(servers.requests) == 1 and sample.loss_mask[-10:] == [0] * 10
    with tool_servers(script()) as servers:
        sample = await made(servers, rollout_max_context_len=4)
    assert sample.status is Sample.Status.TRUNCATED and servers.requests == [] and sample.tokens == ids_of("2+2?")


async def test_a_stop_word_inside_a_turn_is_followed_by_the_templates_end():
    with tool_servers(script(Answer(call("add", a=2, b=2), ends=False), "4")) as servers:
        servers.engines[0]._make = stops(servers.engines[0]._make)
        sample = await made(servers)
    assert sample.response == call("add", a=2, b=2) + TURN.format(4) + "4<|im_end|>"
    start = len(ids_of(call("add", a=2, b=2)))
    assert sample.loss_mask[start] == 0, "the model did not make the token that ends its turn"


def stops(make):
    """At the end of what is said, for a word."""

    async def made(answer, limit, stop):
        ids, reason = await make(answer, limit, stop)
        return ids, "stop" if reason == "length" and not answer.ends else reason

    return made


async def test_without_tools_it_is_one_turn():
    with tool_servers(script("4")) as servers:
        sample = await made(servers, generate_tool_specs_path=None)
    assert sample.response == "4<|im_end|>" and sample.metadata["round_number"] == 1
    assert servers.engines[0].parses == 0


async def test_tools_of_the_sample_are_used_where_the_flag_names_none():
    with tool_servers(script(call("add", a=1, b=2), "3")) as servers:
        sample = Sample(prompt=[{"role": "user", "content": "1+2?"}], index=0, metadata={"tools": TOOLS})
        sample = await made(servers, sample=sample, generate_tool_specs_path=None)
    assert TURN.format(3) in sample.response
    assert text_of(sample.tokens, with_special=True).startswith("<|im_start|>user\n1+2?<|im_end|>\n")


async def test_an_aborted_answer_goes_on_where_it_was():
    said = call("add", a=2, b=2)
    asked = []

    def answers(payload, prompt):
        asked.append(payload["sampling_params"]["max_new_tokens"])
        if len(asked) == 1:
            return Answer(said, hangs_after=10)
        return Answer(said[10:] if len(asked) == 2 else "4")

    with tool_servers(answers) as servers:
        state = tool_state(servers)
        task = asyncio.create_task(made(servers, state=state))
        await abort_when(lambda: servers.engines[0].running, state, servers)
        half = await task
        assert half.status is Sample.Status.ABORTED and half.response == said[:10]
        assert half.metadata[UNFINISHED] == {"turns": 1, "starts": 4, "ended": False}
        state.aborted = False
        sample = await made(servers, state=state, sample=Sample.from_dict(half.to_dict()))
    assert sample.status is Sample.Status.COMPLETED
    assert sample.response == said + TURN.format(4) + "4<|im_end|>" and asked == [256, 246, 256]
    assert sample.metadata["round_number"] == 2 and UNFINISHED not in sample.metadata
    assert len(sample.weight_versions) == 3


async def abort_when(condition, state, servers):
    await eventually(condition)
    state.aborted = True
    await engines.abort([rid for engine in servers.engines for rid in list(engine.running)])


async def test_an_abort_does_not_wait_for_tools_which_are_called_again():
    calls = []

    async def slow(name, arguments):
        calls.append(arguments)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return "4"

    with tool_servers(script(call("add", a=2), "4")) as servers, function_registry.temporary("tests.slow", slow):
        state = tool_state(servers, generate_execute_tool_function_path="tests.slow", generate_tool_timeout=60.0)
        task = asyncio.create_task(made(servers, state=state))
        await abort_when(lambda: calls, state, servers)
        half = await task
        assert half.status is Sample.Status.ABORTED and half.metadata[UNFINISHED]["ended"]
        state.aborted = False
        sample = await made(servers, state=state, sample=half)
    assert sample.response == call("add", a=2) + TURN.format(4) + "4<|im_end|>" and len(calls) == 2


async def test_a_sample_that_is_made_anew_counts_anew():
    with tool_servers(script(call("add", a=1, b=1), "2", call("add", a=1, b=1), "2")) as servers:
        state = tool_state(servers)
        sample = await made(servers, state=state)
        sample.reset_for_retry()
        again = await made(servers, state=state, sample=sample)
    assert again.metadata["tool_calls"] == 1 and again.metadata["round_number"] == 2


async def test_it_is_used_by_the_rollout_with_the_reward_and_the_routing_key():
    with tool_servers(script(call("add", a=2, b=2), "\\boxed{4}"), count=2) as servers:
        state = tool_state(servers, custom_generate_function_path="miles.rollout.generate_hub.multi_turn.generate")
        sample = Sample(prompt="2+2?", label="4", index=0, routing_key="me")
        done = await generate_and_rm(state, sample, state.sampling_params)
    assert done.reward == 1
    assert [head["X-SMG-Routing-Key"] for engine in servers.engines for head in engine.headers] == ["me", "me"]


@pytest.mark.parametrize(
    ("flags", "error", "why"),
    [
        ({"generate_tool_call_parser": None}, BadTools, "no --generate-tool-call-parser"),
        ({"generate_tool_call_parser": "qwen52"}, BadTools, "qwen52 is no parser of the engines"),
        ({"generate_execute_tool_function_path": None}, BadTools, "no --generate-execute-tool-function-path"),
        ({"generate_tool_specs_path": "support.tool_cases.CALCULATOR"}, BadTools, "is no list of tools"),
        ({"generate_tool_specs_path": "support.tool_cases.NOTHING"}, CannotLoad, "NOTHING"),
        ({"generate_tool_specs_path": "support.tool_cases.PARSED"}, BadTools, "is no list of tools"),
    ],
)
async def test_what_is_wrong_with_the_set_up_is_an_error(flags, error, why):
    with tool_servers(script("never")) as servers, pytest.raises(error) as caught:
        await made(servers, **flags)
    assert why in str(caught.value) and len(servers.requests) == (flags.get("generate_tool_call_parser") == "qwen52")


@pytest.mark.parametrize(("status", "error"), [(400, RequestRefused), (503, RequestFailed)])
async def test_an_engine_that_does_not_parse_is_an_error(status, error):
    with tool_servers(script(call("add", a=1))) as servers:
        servers.engines[0].parse_status = status
        with pytest.raises(error):
            await made(servers)


def test_its_flags_have_the_references_defaults():
    import argparse

    parser = argparse.ArgumentParser()
    multi_turn.generate.add_arguments(parser)
    assert vars(parser.parse_args([])) == {
        "generate_max_turns": 16,
        "generate_tool_specs_path": None,
        "generate_tool_call_parser": None,
        "generate_execute_tool_function_path": None,
        "generate_tool_timeout": 60.0,
    }
