"""Dynamic sampling on engines: over-sampling, filters, stopping, partial rollouts, engines that fail."""

import asyncio
import json
from collections import Counter

import pytest
from support.procs import eventually
from support.rollout_cases import Answer, adds, ids_of, make_args, make_config, manager, servers, sums, text_of

from miles.rollout.engines import EnginesFail
from miles.rollout.inference_rollout.inference_rollout_train import FilterKeepsNothing
from miles.rollout.journal import replay
from miles.rollout.saved_state import CannotSave
from miles.rollout.trajectories import save_trajectories
from miles.utils.http_utils import RequestRefused
from miles.utils.types import Sample

FILTER = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
HOOKS = "support.rollout_hooks."
WAITS = "\\boxed{waits for ever, and a day}"


def config_of(tmp_path, **values):
    return make_config(prompt_data=sums(tmp_path / "p.jsonl", 16), run_dir=str(tmp_path), **values)


def prompts_of(rollout, batch):
    """The prompts of a batch, in order."""
    [part] = [rollout.shipped[ref] for ref in batch.refs]
    found, start = [], 0
    for total, response in zip(part["total_lengths"], part["response_lengths"], strict=True):
        found.append(text_of(part["tokens"][start : start + total - response]))
        start += total
    return found


class Slow:
    """Prompts of the given numbers are answered by five tokens, and never to the end; others at once."""

    def __init__(self, *numbers):
        self.numbers = {str(n) for n in numbers}
        self.over = False

    def __call__(self, payload, prompt):
        if prompt.partition("+")[0] in self.numbers and not self.over:
            return Answer(WAITS, hangs_after=5)
        return adds(payload, prompt)


async def started(rollout, fake):
    await rollout.start(fake.targets, fake.router.url, "secret")


@pytest.mark.parametrize("straight", [False, True])
async def test_surplus_is_aborted_at_the_engine_and_its_prompts_come_first_the_next_time(tmp_path, straight):
    """``straight``: requests go to the engines themselves, since the router would drop what they ask for."""
    script = Slow(1, 5)
    config = config_of(tmp_path, over_sampling_batch_size=6, use_rollout_routing_replay=straight)
    with servers(script, count=2) as fake, manager(config) as rollout:
        await started(rollout, fake)
        batch = await rollout.generate(0)
        assert prompts_of(rollout, batch) == [f"{i}+1=" for i in (0, 0, 2, 2, 3, 3, 4, 4)]
        assert batch.metrics["rollout/returned/stopped"] == 2
        sent = [request["rid"] for request in fake.requests if text_of(request["input_ids"])[0] in "15"]
        assert len(sent) == 4
        for engine in fake.engines:  # each has ended by an abort; the other engine may have been spared that
            assert set(engine.aborted) >= {request["rid"] for request in engine.requests} & set(sent)
        await rollout.trained(0)
        assert rollout.ledger() == "6 taken = 4 trained + 0 filtered + 2 returned + 0 open"
        script.over = True
        await rollout.generate(1)  # of six groups the four that are finished first: nobody knows which
        await rollout.trained(1)
    ledger = replay(tmp_path / "journal" / "rollout.jsonl")
    assert ledger.num_taken == ledger.num_trained + ledger.num_returned == 6 + 6
    assert ledger.taken["buffer"] == 2


async def test_a_partial_answer_is_continued_with_its_tokens_and_log_probs(tmp_path):
    script = Slow(1)
    config = config_of(tmp_path, over_sampling_batch_size=5, partial_rollout=True)
    with servers(script) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        source = rollout._loaded.source.inner
        [[first, second]] = source.buffer
        for sample in (first, second):
            assert sample.response_length in (0, 5)  # the stop may have come before the request was sent
            assert sample.response == WAITS[: sample.response_length]
            assert len(sample.rollout_log_probs) == sample.response_length
        kept = {sample.index: (list(sample.tokens), list(sample.rollout_log_probs or [])) for sample in (first, second)}
        assert first.metadata.get("start_rollout_id", 0) == 0
        script.over = True
        fake.engines[0].version = "2"
        before = len(fake.requests)
        batch = await rollout.generate(1)
        [part] = [rollout.shipped[ref] for ref in batch.refs]
        place = part["per_sample"]["sample_indices"].tolist().index(first.index)
        again = [r for r in fake.requests[before:] if text_of(r["input_ids"]).startswith("1+1=")]
        tokens, log_probs = kept[first.index]
        assert tokens in [request["input_ids"] for request in again] or not tokens
        assert part["objects"]["weight_versions"][place] == ["1", "2"] or not log_probs
        assert first.rollout_log_probs[: len(log_probs)] == log_probs
        budget = {r["sampling_params"]["max_new_tokens"] + len(r["input_ids"]) for r in again}
        assert budget == {32 + len("1+1=")}


async def test_without_partial_rollout_nothing_of_a_stopped_group_is_kept(tmp_path):
    with servers(Slow(1)) as fake, manager(config_of(tmp_path, over_sampling_batch_size=5)) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        [group] = rollout._loaded.source.inner.buffer
        assert [(s.tokens, s.response, s.rollout_log_probs, s.reward) for s in group] == [([], "", None, None)] * 2


async def test_finished_surplus_goes_to_the_buffer_with_its_answers(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path, over_sampling_batch_size=16)) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        buffer = rollout._loaded.source.inner.buffer
        assert len(buffer) == 12
        done = [s for group in buffer for s in group if s.reward is not None]
        assert all(s.reward == 1 and s.response for s in done)
        requests = len(fake.requests)
        await rollout.generate(1)
        finished = sum(1 for group in buffer[:4] for s in group if s.reward is not None)
        assert len(fake.requests) <= requests + 8 + 2 * 12 - finished


async def test_the_filter_drops_groups_with_a_reason_and_others_are_taken(tmp_path):
    seen = {}

    def mixed(payload, prompt):
        """Even prompts: one right and one wrong answer; odd ones: both wrong."""
        seen[prompt] = seen.get(prompt, 0) + 1
        right = int(prompt.partition("+")[0]) % 2 == 0 and seen[prompt] % 2
        return adds(payload, prompt) if right else Answer("\\boxed{-5}")

    with servers(mixed) as fake, manager(config_of(tmp_path, dynamic_sampling_filter_path=FILTER)) as rollout:
        await started(rollout, fake)
        batch = await rollout.generate(0)
        assert all(int(prompt.partition("+")[0]) % 2 == 0 for prompt in prompts_of(rollout, batch))
        dropped = batch.metrics["rollout/dynamic_filter/drop_zero_std_0.0"]
        assert dropped >= 3
        assert rollout._loaded.source.ledger.reasons == {"zero_std_0.0": dropped}


@pytest.mark.parametrize(("keep", "said"), [("keep_first", "1 of 4 were kept before"), ("keep_none", "none was kept")])
async def test_a_filter_that_refuses_everything_from_some_group_on_ends_the_run(tmp_path, keep, said):
    hooks = {"custom_generate_function_path": "made_at_once", "custom_rm_path": "async_rm"}
    config = config_of(tmp_path, over_sampling_batch_size=50) | {k: HOOKS + name for k, name in hooks.items()}
    config["dynamic_sampling_filter_path"] = HOOKS + keep
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        with pytest.raises(FilterKeepsNothing, match=f"1000 prompt groups in a row.*{said}"):
            await asyncio.wait_for(rollout.generate(0), 120.0)
        assert rollout.ledger().endswith("+ 0 open")


async def test_a_request_that_one_engine_does_not_take_goes_to_another(tmp_path):
    with servers(adds, count=2) as fake, manager(config_of(tmp_path)) as rollout:
        fake.engines[0].down = True
        await started(rollout, fake)
        batch = await rollout.generate(0)
        assert batch.num_samples == 8
        assert "rollout/engine_errors" not in batch.metrics
        assert len(fake.engines[0].requests) >= 4


async def test_what_an_engine_calls_wrong_ends_the_rollout_and_the_prompts_go_back(tmp_path):
    def refuses(payload, prompt):
        return Answer(status=400, body="unknown parameter")

    with servers(refuses) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        with pytest.raises(RequestRefused, match="unknown parameter"):
            await rollout.generate(0)
        assert rollout.ledger() == "4 taken = 0 trained + 0 filtered + 4 returned + 0 open"
        assert rollout.progress()["phase"] == "idle"


async def test_a_prompt_that_fills_the_context_is_truncated_without_a_request(tmp_path):
    config = config_of(tmp_path, rollout_max_context_len=4, rollout_max_prompt_len=4, rollout_batch_size=2,
                       global_batch_size=4)  # fmt: skip
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        batch = await rollout.generate(0)
        assert fake.requests == []
        assert batch.metrics["rollout/truncated_ratio"] == 1.0


async def test_cancelling_a_rollout_aborts_its_requests_and_gives_its_prompts_back(tmp_path):
    with servers(lambda p, t: Answer(WAITS, hangs_after=0)) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        task = asyncio.ensure_future(rollout.generate(0))
        await eventually(lambda: len(fake.requests) == 8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: rollout.ledger() == "4 taken = 0 trained + 0 filtered + 4 returned + 0 open")
        await eventually(lambda: set(fake.engines[0].aborted) == {r["rid"] for r in fake.requests})


async def test_engines_that_never_answer_end_the_rollout(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path, rollout_batch_size=1, global_batch_size=2)) as rollout:
        await started(rollout, fake)
        rollout._loaded.rollout_function.function.state.request_retries = 0
        fake.engines[0].down = True
        with pytest.raises(EnginesFail, match="503"):
            await rollout.generate(0)
        assert rollout.ledger().endswith("returned + 0 open")


async def test_requests_carry_the_key_and_sampling_parameters(tmp_path):
    config = config_of(tmp_path, rollout_temperature=0.7, rollout_top_p=0.9, rollout_stop_token_ids=[3])
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        request = fake.requests[0]
        assert request["return_logprob"] is True
        assert request["sampling_params"] == {
            "temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_new_tokens": 32, "stop": None, "stop_token_ids": [3],
            "skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False,
        }  # fmt: skip
        assert len({r["rid"] for r in fake.requests}) == 8


async def test_on_policy_means_that_older_answers_are_generated_again(tmp_path):
    config = config_of(tmp_path, over_sampling_batch_size=8, true_on_policy_mode=True)
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.set_weight_version(1)
        await rollout.generate(0)
        fake.engines[0].version = "2"
        await rollout.set_weight_version(2)
        batch = await rollout.generate(1)
        assert batch.metrics["rollout/weight_version/min"] == 2


@pytest.mark.parametrize(("steps", "again"), [(1, False), (2, True)])
async def test_answers_of_weights_that_the_trainer_has_no_more_are_generated_again(tmp_path, steps, again):
    """``--keep-old-actor``: it has those of the engines, and the ones before."""
    config = config_of(tmp_path, over_sampling_batch_size=8, keep_old_actor=True)
    with servers(adds) as fake, manager(config) as rollout:
        fake.engines[0].version = "4"
        await started(rollout, fake)
        await rollout.set_weight_version(4)
        await rollout.generate(0)
        finished = [g for g in rollout._loaded.source.inner.buffer if all(s.reward is not None for s in g)]
        fake.engines[0].version = str(4 + steps)
        for version in range(5, 5 + steps):
            await rollout.set_weight_version(version)
        metrics = (await rollout.generate(1)).metrics
        assert ("rollout/returned/regenerated" in metrics) == (again and bool(finished))
        oldest = 4 + steps if again or not finished else 4
        assert metrics["rollout/weight_version/min"] == oldest


async def test_of_an_earlier_process_the_trainer_has_no_weights(tmp_path):
    config = config_of(tmp_path, over_sampling_batch_size=8, keep_old_actor=True, save=str(tmp_path / "s"))
    with servers(adds) as fake, manager(config) as rollout:
        fake.engines[0].version = "4"
        await started(rollout, fake)
        await rollout.set_weight_version(4)
        await rollout.generate(0)
        await rollout.trained(0)
        await rollout.save(0, config["save"])
        await rollout.commit_save(0, config["save"])
    with servers(adds) as fake, manager(config) as rollout:
        fake.engines[0].version = "5"
        await started(rollout, fake)
        await rollout.load(0, config["save"])
        await rollout.set_weight_version(5)
        batch = await rollout.generate(1)
        assert batch.metrics["rollout/weight_version/min"] == 5


@pytest.mark.parametrize(("said", "again"), [("7", False), ("007", False), ("8", True), ("v7", True)])
async def test_weight_versions_are_compared_as_numbers(tmp_path, said, again):
    """Groups that are finished are generated again only if their weights are others."""
    config = config_of(tmp_path, over_sampling_batch_size=8, true_on_policy_mode=True)
    with servers(adds) as fake, manager(config) as rollout:
        fake.engines[0].version = said
        await started(rollout, fake)
        await rollout.set_weight_version(7)
        await rollout.generate(0)
        finished = [g for g in rollout._loaded.source.inner.buffer if all(s.reward is not None for s in g)]
        metrics = (await rollout.generate(1)).metrics
        assert ("rollout/returned/regenerated" in metrics) == (again and bool(finished))


async def test_who_does_not_stop_in_time_is_left(tmp_path):
    config = config_of(tmp_path, over_sampling_batch_size=5, partial_rollout=True)
    with servers(Slow(1)) as fake, manager(config) as rollout:
        fake.engines[0].deaf = True
        await started(rollout, fake)
        rollout._loaded.rollout_function.function.state.straggler_deadline_s = 0.2
        batch = await rollout.generate(0)
        assert batch.metrics["rollout/returned/late"] == 1
        assert rollout.ledger() == "5 taken = 0 trained + 0 filtered + 1 returned + 4 open"
        [group] = rollout._loaded.source.inner.buffer
        assert [s.response_length for s in group] == [0, 0]


def resumed(rollout, index, made):
    """A group of the data source of which one sample was stopped within its answer."""
    [group] = rollout._loaded.source.inner.get_samples(1)
    sample = group[index]
    sample.tokens = ids_of(sample.prompt + made)
    sample.response, sample.response_length = made, len(made)
    sample.rollout_log_probs = [-1.0] * len(made)
    sample.status, sample.weight_versions = Sample.Status.ABORTED, ["1"]
    return group


@pytest.mark.parametrize("masked", [False, True])
async def test_what_older_weights_made_can_be_left_out_of_the_loss(tmp_path, masked):
    config = config_of(tmp_path, partial_rollout=True, mask_offpolicy_in_partial_rollout=masked)
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        group = resumed(rollout, 1, "so")
        rollout._loaded.source.inner.add_samples([group])
        [ref] = (await rollout.generate(0)).refs
        part = rollout.shipped[ref]
    place = part["per_sample"]["sample_indices"].tolist().index(group[1].index)
    start = part["response_lengths"][:place].sum()
    mask = part["loss_masks"][start : start + part["response_lengths"][place]].tolist()
    new = len("\\boxed{1}") + 1  # and the token that ends it
    assert mask == [int(not masked)] * 2 + [1] * new
    assert part["loss_masks"].sum() == len(part["loss_masks"]) - 2 * masked


async def test_samples_that_are_finished_make_room_for_other_prompts(tmp_path):
    """Of two prompts one sample does not end before a fourth prompt is asked for."""
    seen = Counter()

    def script(payload, prompt):
        seen[prompt[0]] += 1
        if prompt[0] in "01" and seen[prompt[0]] == 2 and not seen["3"]:
            return Answer(WAITS, hangs_after=3)
        if prompt[0] == "3":
            for event in fake.engines[0].running.values():
                event.set()
        return adds(payload, prompt)

    config = config_of(
        tmp_path, rollout_batch_size=3, over_sampling_batch_size=3, global_batch_size=6,
        rollout_submission_granularity="sample",
    )  # fmt: skip
    with servers(script) as fake, manager(config) as rollout:
        await started(rollout, fake)
        async with asyncio.timeout(60):
            batch = await rollout.generate(0)
        assert batch.num_samples == 6
        assert seen["3"]
        taken = rollout._loaded.source.ledger.num_taken
        assert taken >= 4  # a fifth may have found room, too
        assert rollout.ledger() == f"{taken} taken = 0 trained + 0 filtered + {taken - 3} returned + 3 open"


async def test_trajectories_are_text_by_role(tmp_path):
    template = str(tmp_path / "t" / "{rollout_id}.jsonl")
    evaluated = ["sums", sums(tmp_path / "e.jsonl", 1)]
    config = config_of(tmp_path, save_debug_trajectory_data=template, eval_prompt_data=evaluated, eval_interval=1)
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        await rollout.evaluate(0)
    rows = [json.loads(line) for line in (tmp_path / "t" / "0.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(8))
    assert rows[2]["messages"] == [
        {"role": "prompt", "content": "1+1="}, {"role": "assistant", "content": "\\boxed{2}<|im_end|>"},
    ]  # fmt: skip
    assert (rows[2]["reward"], rows[2]["status"], rows[2]["label"]) == (1, "completed", "2")
    [row] = map(json.loads, (tmp_path / "t" / "eval_0.jsonl").read_text().splitlines())
    assert row["rollout_id"] == "eval_0"


def test_trajectories_tell_what_does_not_count(tmp_path):
    talk = Sample(
        prompt=[{"role": "user", "content": "hi"}], tokens=ids_of("hiabc"), response="abc", response_length=3,
        loss_mask=[1, 0, 1], metadata={"odd": {1}},
    )  # fmt: skip
    args = make_args(save_debug_trajectory_data=str(tmp_path / "{rollout_id}.jsonl"))
    row = json.loads(save_trajectories(args, 3, [[talk]]).read_text())
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", "hi"), ("assistant", "a"), ("masked", "b"), ("assistant", "c"),
    ]  # fmt: skip
    assert row["metadata"] == {"odd": "{1}"}
    args.save_debug_trajectory_data = "/dev/null/{rollout_id}.jsonl"
    with pytest.raises(CannotSave, match="cannot be written"):
        save_trajectories(args, 3, [[talk]])
