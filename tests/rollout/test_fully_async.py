"""Fully asynchronous generation: a producer that never stops, a bounded buffer, answers that are never too old."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.procs import eventually
from support.rollout_cases import Answer, adds, make_config, manager, servers, sums, text_of

from miles.rollout.base_types import RolloutFnTrainInput
from miles.rollout.data_buffer import DataBufferConstructorInput, FifoDataBuffer, buffer_capacity
from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.rollout.engines import EnginesFail
from miles.rollout.fully_async_rollout import staleness
from miles.rollout.hooks import HookFailed
from miles.rollout.inference_rollout.inference_rollout_train import FilterKeepsNothing, NoMorePrompts
from miles.rollout.journal import replay
from miles.utils.misc import function_registry
from miles.utils.types import Sample


def config_of(tmp_path, **values):
    wanted = {"fully_async": True, "async_data_buffer_capacity_factor": 2.0, "async_unused_samples_handler": "drop"}
    data = sums(tmp_path / "p.jsonl", 16)
    return make_config(prompt_data=data, run_dir=str(tmp_path), **wanted | values)


async def started(rollout, fake):
    await rollout.start(fake.targets, fake.router.url, "secret")


def function_of(rollout):
    return rollout._loaded.rollout_function.function


def versions_of(rollout, batch):
    return [v for ref in batch.refs for v in rollout.shipped[ref]["objects"].get("weight_versions", [])]


async def test_engines_work_on_while_nobody_asks_and_no_further_than_the_buffer_holds(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        producer = function_of(rollout).producer
        # 2.0 * 4 groups in the buffer, and one per place under way that waits for room.
        await eventually(lambda: function_of(rollout).buffer.get_metrics()["buffered"] == 8)
        assert producer.num_under_way <= 4
        # Four are in the rollout, eight in the buffer, at most four wait for room; one may be going in right now.
        assert 8 + 4 <= int(rollout.ledger().split()[-2]) <= 8 + 4 + 4
        before = len(fake.requests)
        await rollout.trained(0)
        batch = await rollout.generate(1)
        assert batch.num_samples == 8
        await eventually(lambda: len(fake.requests) > before)
        await rollout.trained(1)
    ledger = replay(tmp_path / "journal" / "rollout.jsonl")
    assert ledger.num_trained == 8
    assert ledger.num_taken == ledger.num_trained + ledger.num_returned + len(ledger.open)


@pytest.mark.parametrize("handler", ["drop", "retry"])
async def test_answers_of_weights_that_are_too_old_are_not_trained_on(tmp_path, handler):
    config = config_of(tmp_path, max_weight_staleness=1, async_unused_samples_handler=handler)
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.set_weight_version(1)
        await rollout.generate(0)
        await eventually(lambda: function_of(rollout).buffer.get_metrics()["buffered"] == 8)
        for engine in fake.engines:
            engine.version = "3"
        await rollout.set_weight_version(3)
        batch = await rollout.generate(1)
        assert batch.metrics["rollout/fully_async/staleness/max"] <= 1
        assert batch.metrics["rollout/fully_async/stale"] >= 8
        await rollout.trained(0)
        await rollout.trained(1)
    ledger = replay(tmp_path / "journal" / "rollout.jsonl")
    assert (ledger.given_back["stale"] if handler == "retry" else ledger.reasons["stale"]) >= 8
    assert ledger.num_trained == 8


async def test_without_a_bound_old_answers_are_taken_and_told(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        await rollout.set_weight_version(1)
        await rollout.generate(0)
        await rollout.set_weight_version(6)
        batch = await rollout.generate(1)
        assert batch.metrics["rollout/fully_async/staleness/max"] == 5


async def in_this_loop(rollout, coroutine):
    """On the loop of user code, where the rollout function lives."""
    return await rollout.user.submit(coroutine)


async def test_no_group_is_begun_while_paused(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        function = function_of(rollout)

        async def paused():
            async with function.producer.paused():
                # What was under way when the pause began gets finished; some of it may wait for room.
                await eventually(lambda: all(task.done() for task in function.producer._pending))
                before = len(fake.requests)
                # There is room in the buffer again, and places are free: nobody takes them.
                await function(RolloutFnTrainInput(1, None))
                await eventually(lambda: function.producer.num_under_way == 0)
                return before, len(fake.requests)

        before, after = await in_this_loop(rollout, paused())
        assert before == after
        await eventually(lambda: len(fake.requests) > before)


async def test_an_evaluation_pauses_the_producer(tmp_path):
    eval_data = sums(tmp_path / "eval.jsonl", 2)
    config = config_of(tmp_path, eval_prompt_data=["held", eval_data], eval_interval=1, eval_max_response_len=16)
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        result = await rollout.evaluate(0)
        assert result.metrics["eval/held"] == 1.0
        batch = await rollout.generate(1)
        assert batch.num_samples == 8


async def test_an_error_of_user_code_in_the_producer_ends_the_call(tmp_path):
    config = config_of(tmp_path, custom_rm_path="support.rollout_hooks.failing_rm")
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        with pytest.raises(HookFailed):
            await rollout.generate(0)


@pytest.mark.parametrize("handler", ["drop", "retry"])
async def test_a_generate_function_that_finishes_nothing_is_told(tmp_path, handler):
    async def unfinished(args, sample, sampling_params):
        sample.status = Sample.Status.ABORTED
        return sample

    with function_registry.temporary("tests.unfinished", unfinished):
        config = config_of(
            tmp_path, custom_generate_function_path="tests.unfinished", async_unused_samples_handler=handler
        )
        with servers(adds) as fake, manager(config) as rollout:
            await started(rollout, fake)
            with pytest.raises(FilterKeepsNothing, match="came back unfinished"):
                await rollout.generate(0)
            assert "aborted" in rollout.ledger() or " filtered" in rollout.ledger()


async def test_a_filter_that_keeps_nothing_leaves_each_group_with_one_end(tmp_path):
    hooks = {"custom_generate_function_path": "made_at_once", "custom_rm_path": "async_rm",
             "dynamic_sampling_filter_path": "keep_none"}  # fmt: skip
    config = config_of(tmp_path, **{name: f"support.rollout_hooks.{hook}" for name, hook in hooks.items()})
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        with pytest.raises(FilterKeepsNothing, match="1000 prompt groups in a row were filtered"):
            await rollout.generate(0)
        ledger = rollout._loaded.source.ledger
        assert (ledger.taken["foreign"], ledger.num_filtered, ledger.open) == (0, 1000, {})
        assert ledger.num_taken == 1000 + ledger.num_returned <= 1000 + 3


class Ending(RolloutDataSourceWithBuffer):
    """A user's, whose prompts come to an end."""

    def get_samples(self, num_samples):
        """At most as many as there are."""
        return super().get_samples(min(num_samples, len(self) - self.sample_offset))


async def test_a_data_source_that_has_nothing_more_is_told_after_the_last_group(tmp_path):
    path = f"{__name__}.Ending"
    with (
        function_registry.temporary(path, Ending),
        servers(adds) as fake,
        manager(config_of(tmp_path, data_source_path=path)) as rollout,
    ):
        await started(rollout, fake)
        for rollout_id in range(4):
            batch = await rollout.generate(rollout_id)
            assert batch.num_samples == 8
            await rollout.trained(rollout_id)
        with pytest.raises(NoMorePrompts, match="no more prompts"):
            await rollout.generate(4)
        assert rollout.ledger() == "16 taken = 16 trained + 0 filtered + 0 returned + 0 open"


async def silent(args, sample, sampling_params):
    """Tells no weight versions."""
    sample.tokens, sample.response, sample.response_length = [1, 2], "1", 1
    sample.rollout_log_probs, sample.status = [-1.0], Sample.Status.COMPLETED
    return sample


@pytest.mark.parametrize("handler", ["drop", "retry"])
async def test_answers_without_a_version_are_as_old_as_their_beginning(tmp_path, handler):
    with function_registry.temporary("tests.silent", silent):
        config = config_of(
            tmp_path, max_weight_staleness=1, rm_type="random", custom_generate_function_path="tests.silent",
            async_unused_samples_handler=handler,
        )  # fmt: skip
        with servers(adds) as fake, manager(config) as rollout:
            await started(rollout, fake)
            await rollout.set_weight_version(1)
            await rollout.generate(0)
            await eventually(lambda: function_of(rollout).buffer.get_metrics()["buffered"] == 8)
            await rollout.set_weight_version(3)
            batch = await rollout.generate(1)
            assert batch.metrics["rollout/fully_async/stale"] >= 8
            assert batch.metrics["rollout/fully_async/staleness/max"] == 0


async def test_only_answers_that_are_too_old_are_told(tmp_path):
    async def of_old_weights(args, sample, sampling_params):
        sample.tokens, sample.response, sample.response_length = [*sample.tokens, 1], "1", 1
        sample.rollout_log_probs, sample.weight_versions = [-1.0], ["1"]
        sample.status = Sample.Status.COMPLETED
        return sample

    with function_registry.temporary("tests.of_old_weights", of_old_weights):
        config = config_of(
            tmp_path, max_weight_staleness=0, rm_type="random", custom_generate_function_path="tests.of_old_weights"
        )
        with servers(adds) as fake, manager(config) as rollout:
            await started(rollout, fake)
            await rollout.set_weight_version(7)
            with pytest.raises(FilterKeepsNothing, match="older than --max-weight-staleness"):
                await rollout.generate(0)


async def test_engines_that_fail_now_and_then_do_not_add_up(tmp_path):
    with servers(adds) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        producer = function_of(rollout).producer

        def fail(times):
            for _ in range(times):
                [group] = producer.source.get_samples(1)
                producer._engine_failed(group, RuntimeError("no answer"))

        for _ in range(3):
            fail(8)
            [group] = producer.source.get_samples(1)
            for sample in group:
                sample.status, sample.reward = Sample.Status.COMPLETED, 1.0
            await producer._judge(group, group)
        fail(8)
        with pytest.raises(EnginesFail, match="9 prompt groups in a row"):
            fail(1)


async def test_what_is_finished_and_not_trained_on_is_in_the_checkpoint_as_it_is(tmp_path):
    config = config_of(tmp_path, save=str(tmp_path / "save"))
    with servers(adds) as fake, manager(config) as rollout:
        await started(rollout, fake)
        await rollout.generate(0)
        await rollout.trained(0)
        await eventually(lambda: function_of(rollout).buffer.get_metrics()["buffered"] == 8)
        await rollout.save(0, str(tmp_path / "save"))
        await rollout.commit_save(0, str(tmp_path / "save"))
        first = {text_of(request["input_ids"]) for request in fake.requests[:]}
    assert first
    answers = []

    def count(payload, prompt):
        answers.append(prompt)
        return adds(payload, prompt)

    config = config_of(tmp_path, load=str(tmp_path / "save"), async_max_concurrent_samples=2)
    with servers(count) as fake, manager(config) as rollout:
        await started(rollout, fake)
        assert await rollout.load(0, str(tmp_path / "save"))
        batch = await rollout.generate(1)
        # The eight groups in the buffer come first, and are not generated again.
        assert batch.num_samples == 8
        assert len(answers) < 16
        await rollout.trained(1)
    assert replay(tmp_path / "journal" / "rollout.jsonl").num_trained == 8


async def test_an_answer_that_never_ends_keeps_nobody(tmp_path):
    def script(payload, prompt):
        return Answer("x" * 30, hangs_after=3) if prompt.startswith("0+") else adds(payload, prompt)

    with servers(script) as fake, manager(config_of(tmp_path)) as rollout:
        await started(rollout, fake)
        for number in range(3):
            batch = await rollout.generate(number)
            assert batch.num_samples == 8
            await rollout.trained(number)
    # Ending gives it back.
    ledger = replay(tmp_path / "journal" / "rollout.jsonl")
    assert ledger.num_trained == 12
    assert 0 in ledger.returned


async def test_a_successor_judges_by_the_weights_that_are_announced(tmp_path):
    config = config_of(tmp_path, max_weight_staleness=0)
    with servers(adds) as fake:
        with manager(config) as rollout:
            await started(rollout, fake)
            await rollout.keep(-1)
        with manager(config) as rollout:
            await started(rollout, fake)
            await rollout.recover(-1, 1, 2, {})
            generating = asyncio.ensure_future(rollout.generate(0))
            # Engines have version 1 still: their answers are too old for the weights that are about to be.
            await eventually(lambda: "stale" in function_of(rollout).producer.counts)
            assert not generating.done()
            for engine in fake.engines:
                engine.version = "2"
            await rollout.set_weight_version(2)
            batch = await generating
            assert batch.metrics["rollout/fully_async/staleness/max"] == 0
            assert versions_of(rollout, batch) == [["2"]] * 8
            assert not await rollout.may_become(3)
            await rollout.trained(0)
            assert await rollout.may_become(3)


class NewestFirst(FifoDataBuffer):
    """A user's: what is youngest is trained on first."""

    async def put(self, group):
        await super().put(group)
        self._groups.rotate(1)


async def test_a_buffer_of_the_users_takes_the_place_of_ours(tmp_path):
    path = f"{__name__}.NewestFirst"
    with function_registry.temporary(path, NewestFirst):
        config = config_of(tmp_path, custom_async_data_buffer_path=path)
        with servers(adds) as fake, manager(config) as rollout:
            await started(rollout, fake)
            await rollout.generate(0)
            assert type(function_of(rollout).buffer) is NewestFirst


def buffer_of(capacity):
    return FifoDataBuffer(DataBufferConstructorInput(SimpleNamespace(), capacity))


@given(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=8))
@settings(deadline=None)
def test_the_buffer_is_first_in_first_out_and_bounded(capacity, takes):
    takes = [min(take, capacity) for take in takes]
    total = sum(takes)

    async def run():
        buffer, most = buffer_of(capacity), 0

        async def produce():
            nonlocal most
            for number in range(total):
                await buffer.put([number])
                most = max(most, int(buffer.get_metrics()["buffered"]))

        producing = asyncio.ensure_future(produce())
        found = [group for take in takes for group in await buffer.get(take)]
        await producing
        return found, most

    found, most = asyncio.run(run())
    assert found == [[number] for number in range(total)]
    assert most <= capacity


async def test_who_gives_up_waiting_takes_nothing():
    buffer = buffer_of(2)
    waiting = asyncio.ensure_future(buffer.get(2))
    await buffer.put(["a"])
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await buffer.put(["b"])
    assert await buffer.get(2) == [["a"], ["b"]]


@pytest.mark.parametrize(("factor", "groups"), [(2.0, 8), (0.1, 1), (1.3, 5)])
def test_the_capacity_is_rounded_down(factor, groups):
    assert buffer_capacity(SimpleNamespace(async_data_buffer_capacity_factor=factor, rollout_batch_size=4)) == groups


@pytest.mark.parametrize(
    ("versions", "age"), [([["3", "4"], ["5"]], 2), ([[], []], 0), ([["default"], ["4"]], 1), ([["5"]], 0)]
)
def test_the_oldest_token_decides(versions, age):
    assert staleness([Sample(weight_versions=list(v)) for v in versions], 5) == age


async def test_answers_without_a_version_that_are_begun_after_an_update_are_as_young_as_it(tmp_path):
    with function_registry.temporary("tests.silent", silent):
        config = config_of(
            tmp_path, max_weight_staleness=0, rm_type="random", custom_generate_function_path="tests.silent"
        )
        with servers(adds) as fake:
            with manager(config) as rollout:
                await started(rollout, fake)
                await rollout.keep(-1)
            with manager(config) as rollout:
                await started(rollout, fake)
                await rollout.recover(-1, 1, 2, {})
                generating = asyncio.ensure_future(rollout.generate(0))
                await eventually(lambda: "stale" in function_of(rollout).producer.counts)
                await rollout.set_weight_version(2)  # while the rollout is asked for
                batch = await generating
                assert batch.metrics["rollout/fully_async/staleness/max"] == 0


async def test_a_rollout_that_fails_after_it_was_admitted_holds_no_weights_back(tmp_path):
    def fails(args, groups):
        raise ValueError("not these")

    with function_registry.temporary("tests.fails", fails):
        config = config_of(tmp_path, max_weight_staleness=1, rollout_sample_filter_path="tests.fails")
        with servers(adds) as fake, manager(config) as rollout:
            await started(rollout, fake)
            await rollout.set_weight_version(1)
            with pytest.raises(HookFailed, match="not these"):
                await rollout.generate(0)
            assert await rollout.may_become(2)
