"""What an engine does with our requests: the same tests for the real SGLang and for the scripted stand-in."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from support.engines import KEY, REAL, changed_copy, engine_model
from support.fake_engine import fake_engine, load_directory

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.client import EngineClient, EngineRefused, WouldEndEngine
from miles.backends.weight_update.failures import EnginesMissedUpdate
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.sender import make_sender

PROMPT = [72, 101, 108, 108, 111]
GREEDY = {"temperature": 0.0, "ignore_eos": True}
LONG = GREEDY | {"max_new_tokens": 450}


@dataclass
class Subject:
    client: EngineClient
    target: EngineTarget
    model: Path


@pytest_asyncio.fixture(params=["fake", pytest.param(REAL, marks=pytest.mark.full)])
async def engine(request):
    if request.param == "fake":
        async with (
            fake_engine(model=engine_model(), api_key=KEY) as fake,
            EngineClient(fake.url, KEY, name="engine-0", vocab_size=320) as client,
        ):
            yield Subject(client, EngineTarget("engine-0", fake.url, KEY, 1, 1, True), engine_model())
        return
    real = request.getfixturevalue("warm_engine")
    async with EngineClient(real.url, KEY, name="engine-0", vocab_size=320) as client:
        yield Subject(client, real.target, real.model)
        # As the next test expects it.
        await client.resume()
        await client.update_weights_from_disk(str(real.model), version="default")


async def update(engine, weights, *, version=1, method="tensor", bucket_bytes=20000, sender=None, new_group=True):
    """A whole weight update, as the fleet has it."""
    client = engine.client
    await client.pause()
    await client.flush_cache()
    await client.begin_weight_update()
    wanted = WeightUpdate(version, (engine.target,), method, bucket_bytes, new_group=new_group)
    used = sender or make_sender(ParallelState(), wanted, torch.device("cpu"))
    try:
        return await asyncio.to_thread(used.send, wanted, iter(weights.items()))
    finally:
        if sender is None:
            used.close()
        await client.update_weight_version(version)
        await client.end_weight_update()
        await client.resume()


async def running(engine, rid, **sampling):
    """A request that is being answered, and has tokens."""
    task = asyncio.ensure_future(engine.client.generate(PROMPT, LONG | sampling, rid=rid))
    await others_have_tokens(engine)
    await others_have_tokens(engine)  # the first may have come before it, not so the second
    assert not task.done()
    return task


async def others_have_tokens(engine):
    """Requests that came before have made tokens since, when one that came after them has: all are in one batch."""
    await engine.client.generate([1, 2], GREEDY | {"max_new_tokens": 3})


async def test_an_answer_has_as_many_tokens_as_asked_for_each_with_its_log_prob(engine):
    answer = await engine.client.generate(PROMPT, GREEDY | {"max_new_tokens": 7})
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == 7 == meta["completion_tokens"]
    assert [token for _, token, *_ in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(logprob <= 0 for logprob, *_ in meta["output_token_logprobs"])
    assert meta["finish_reason"] == {"type": "length", "length": 7}
    assert meta["prompt_tokens"] == len(PROMPT)


async def test_a_stop_token_ends_an_answer(engine):
    tokens = (await engine.client.generate(PROMPT, GREEDY | {"max_new_tokens": 8}))["output_ids"]
    stop = tokens[4]
    answer = await engine.client.generate(
        PROMPT, {"temperature": 0.0, "max_new_tokens": 8, "stop_token_ids": [stop], "no_stop_trim": True}
    )
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["output_ids"] == tokens[: tokens.index(stop) + 1]


async def test_the_same_prompt_gives_the_same_answer_and_its_prefix_is_cached_until_a_flush(engine):
    await engine.client.flush_cache()
    prompt = [*PROMPT, *range(50, 90)]
    answers = [await engine.client.generate(prompt, GREEDY | {"max_new_tokens": 5}) for _ in range(2)]
    await engine.client.flush_cache()
    answers.append(await engine.client.generate(prompt, GREEDY | {"max_new_tokens": 5}))
    assert answers[0]["output_ids"] == answers[1]["output_ids"] == answers[2]["output_ids"]
    cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
    assert cached[0] == cached[2] == 0 and cached[1] > 0


async def test_a_token_outside_of_the_vocabulary_is_not_sent(engine):
    with pytest.raises(WouldEndEngine, match="does not have") as caught:
        await engine.client.generate([5, 320], GREEDY)
    assert "320" in caught.value.evidence
    with pytest.raises(WouldEndEngine, match="is empty"):
        await engine.client.generate([], GREEDY)
    assert await engine.client.health()


async def test_an_unknown_sampling_parameter_is_refused_by_its_name(engine):
    with pytest.raises(EngineRefused) as caught:
        await engine.client.generate(PROMPT, {"temprature": 0.5})
    assert caught.value.fields["status"] == 400 and "temprature" in caught.value.evidence


async def test_a_prompt_longer_than_the_context_is_refused_with_the_reason(engine):
    with pytest.raises(EngineRefused) as caught:
        await engine.client.generate([7] * 600, GREEDY | {"max_new_tokens": 4})
    assert "600" in caught.value.evidence and "context length" in caught.value.evidence


@pytest.mark.parametrize("key", ["", "another"])
async def test_nothing_but_health_is_answered_without_the_key(engine, key):
    async with EngineClient(engine.target.url, key, name="engine-0") as stranger:
        for call in (stranger.model_info(), stranger.server_info(), stranger.pause(), stranger.begin_weight_update()):
            with pytest.raises(EngineRefused) as caught:
                await call
            assert caught.value.fields["status"] == 401 and "key" in caught.value.advice
        with pytest.raises(EngineRefused):
            await stranger.generate(PROMPT, GREEDY)
        assert await stranger.health()


async def test_the_completions_api_takes_the_key_too(engine):
    body = {"model": "default", "prompt": "Hello", "max_tokens": 4, "temperature": 0.0}
    _, answer = await engine.client.call("POST", "/v1/completions", body)
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


async def test_an_abort_by_id_ends_that_request_with_what_it_has(engine):
    one, other = await running(engine, "one"), await running(engine, "other", max_new_tokens=200)
    await engine.client.abort("one")
    answer = await one
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 450
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])
    assert (await other)["meta_info"]["finish_reason"]["type"] == "length"


async def test_an_abort_of_an_unknown_id_harms_nobody(engine):
    task = await running(engine, "one", max_new_tokens=200)
    await engine.client.abort("on")
    assert (await task)["meta_info"]["finish_reason"]["type"] == "length"


async def test_abort_all_ends_all(engine):
    tasks = [await running(engine, f"r{index}") for index in range(3)]
    await engine.client.abort_all()
    for task in tasks:
        assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_paused_engine_keeps_requests_and_takes_new_ones_up_when_it_goes_on(engine, mode):
    before = await running(engine, "before", max_new_tokens=200)
    await engine.client.pause(mode)
    after = asyncio.ensure_future(engine.client.generate(PROMPT, GREEDY | {"max_new_tokens": 3}))
    done, _ = await asyncio.wait({before, after}, timeout=0.5)
    assert not done
    assert (await engine.client.model_info())["weight_version"] and await engine.client.health()
    await engine.client.resume()
    assert len((await before)["output_ids"]) == 200 and len((await after)["output_ids"]) == 3


async def test_pausing_by_abort_ends_what_runs(engine):
    task = await running(engine, "one")
    await engine.client.pause("abort")
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    await engine.client.flush_cache()


async def test_the_cache_cannot_be_flushed_while_requests_run_but_while_they_are_retracted(engine):
    task = await running(engine, "one")
    with pytest.raises(EngineRefused):
        await engine.client.flush_cache(timeout_s=0.1)
    await engine.client.pause("retract")
    await engine.client.flush_cache()
    await engine.client.resume()
    await engine.client.abort("one")
    await task


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_each_token_is_reported_with_the_version_that_made_it(engine, mode):
    task = await running(engine, "one")
    await engine.client.pause(mode)
    await engine.client.update_weight_version(7)
    await engine.client.resume()
    await others_have_tokens(engine)
    await engine.client.abort("one")
    meta = (await task)["meta_info"]
    spans = meta["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "7"]
    assert spans[0]["start"] == 0 and spans[0]["end"] == spans[1]["start"]
    assert spans[1]["end"] == meta["completion_tokens"]
    assert (await engine.client.model_info())["weight_version"] == "7"


async def test_weights_are_taken_inside_of_the_bracket_only(engine):
    assert await engine.client.has_bracket()
    with pytest.raises(EngineRefused):
        await engine.client.end_weight_update()
    wanted = WeightUpdate(1, (engine.target,), "tensor", 1 << 20)
    sender = make_sender(ParallelState(), wanted, torch.device("cpu"))
    with pytest.raises(EnginesMissedUpdate) as caught:
        await asyncio.to_thread(sender.send, wanted, iter(load_directory(engine.model).items()))
    assert caught.value.fields["engines"] == ["engine-0"] and "begin_weight_update" in caught.value.evidence
    await engine.client.begin_weight_update()
    with pytest.raises(EngineRefused, match="refused"):
        await engine.client.begin_weight_update()
    await engine.client.end_weight_update()


@pytest.mark.parametrize(("method", "has_stream"), [("tensor", True), ("broadcast", True), ("broadcast", False)])
async def test_after_an_update_it_holds_what_it_would_load_from_disk_and_generates_with_it(
    engine, tmp_path, method, has_stream
):
    engine.target = replace(engine.target, has_stream=has_stream)
    before = await engine.client.generate(PROMPT, GREEDY | {"max_new_tokens": 10})
    old, _ = await engine.client.checksums()
    path, weights = changed_copy(engine.model, tmp_path / "changed", factor=1.5)
    await update(engine, weights, version=3, method=method)
    held, by_name = await engine.client.checksums()
    after = await engine.client.generate(PROMPT, GREEDY | {"max_new_tokens": 10})
    await engine.client.update_weights_from_disk(str(path))
    assert (held, by_name) == await engine.client.checksums()
    assert held != old and after["output_ids"] != before["output_ids"]
    assert after["meta_info"]["cached_tokens"] == 0, "cached with the weights from before"
    assert after["meta_info"]["weight_version"] == "3"


@pytest.mark.parametrize("has_stream", [True, False])
async def test_a_group_is_kept_and_made_anew_when_told_to(engine, has_stream):
    weights, engine.target = load_directory(engine.model), replace(engine.target, has_stream=has_stream)
    wanted = WeightUpdate(1, (engine.target,), "broadcast", 20000)
    sender = make_sender(ParallelState(), wanted, torch.device("cpu"))
    sums = set()
    for version, new_group in ((1, True), (2, False), (3, True)):
        changed = {name: tensor * (1 + version / 10) for name, tensor in weights.items()}
        await update(engine, changed, version=version, method="broadcast", sender=sender, new_group=new_group)
        sums.add((await engine.client.checksums())[0])
    sender.close()
    assert len(sums) == 3
    assert await engine.client.destroy_weights_update_group("miles") or has_stream
    assert not await engine.client.destroy_weights_update_group("miles")


async def test_a_request_that_spans_an_update_goes_on_with_the_new_weights(engine):
    task = await running(engine, "one")
    changed = {name: tensor * 1.5 for name, tensor in load_directory(engine.model).items()}
    await update(engine, changed, version=9)
    await others_have_tokens(engine)
    await engine.client.abort("one")
    answer = await task
    assert [span["version"] for span in answer["meta_info"]["weight_versions"]] == ["default", "9"]


async def test_memory_is_not_released_while_it_is_busy_nor_taken_back_unreleased(engine):
    await engine.client.resume_memory()
    task = await running(engine, "one")
    with pytest.raises(EngineRefused):
        await engine.client.call("POST", "/flush_cache")
    releasing = asyncio.ensure_future(engine.client.release_memory(["kv_cache"]))
    await asyncio.sleep(0.3)
    assert not releasing.done()
    await engine.client.abort("one")
    await task
    await releasing
    await engine.client.resume_memory(["weights", "kv_cache"])
    assert len((await engine.client.generate(PROMPT, GREEDY | {"max_new_tokens": 3}))["output_ids"]) == 3
