"""A fleet's weight updates against scripted engines that fail at every step there is."""

import asyncio
from contextlib import AsyncExitStack

import pytest
import torch
from support.fake_engine import fake_engine
from support.procs import eventually

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.fleet_parts import Engine
from miles.backends.sglang_utils.fleet_update import NoEngineLeft, UpdateRunner, settings
from miles.backends.weight_update.messages import EngineTarget
from miles.backends.weight_update.sender import make_sender
from miles_controller.weight_versions import Holds, UpdateOutOfOrder

PATHS = {
    "pause": "/pause_generation",
    "open": "/begin_weight_update",
    "send": "/update_weights_from_tensor",
    "commit": "/update_weight_version",
    "close": "/end_weight_update",
    "resume": "/continue_generation",
}


class Service:
    """The agent's side of an engine: only notes what it is told."""

    def __init__(self):
        self.told = []

    async def pause(self):
        self.told.append("pause")

    async def resume(self):
        self.told.append("resume")


class Fleet:
    """Scripted engines, the runner, and a trainer that is this process."""

    def __init__(self, stack, *, has_stream=True, **options):
        self.stack, self.fakes, self.fenced, self.senders = stack, [], [], {}
        self.has_stream = has_stream
        self.runner = UpdateRunner(fence=self._fence, **settings({"colocate": True, **options}))
        self.weights = {"a": torch.zeros(100), "b": torch.ones(7)}
        self.updates = []

    async def add(self, **options):
        fake = await self.stack.enter_async_context(fake_engine(api_key="key", **options))
        index = len(self.fakes)
        self.fakes.append(fake)
        name = f"engine-{index}"
        client = await self.stack.enter_async_context(EngineClient(fake.url, "key", name=name))
        bracket = await client.has_bracket()
        target = EngineTarget(name, fake.url, "key", 1, 1 + index, bracket, has_stream=self.has_stream)
        self.runner.joined(Engine(target, Service(), client), self.runner.state.version)
        return fake

    async def _fence(self, engine, why):
        """As the agent does: what hangs is killed."""
        self.fenced.append((engine.target.name, why))
        fake = self.fakes[int(engine.target.name.removeprefix("engine-"))]
        if fake.frozen:
            await fake.die()

    async def update(self, value):
        self.weights = {name: torch.full_like(tensor, value) for name, tensor in self.weights.items()}
        return await self.runner.update(self.send)

    async def send(self, update):
        self.updates.append(update)
        if update.method not in self.senders:
            self.senders[update.method] = make_sender(ParallelState(), update, torch.device("cpu"))
            self.stack.callback(self.senders[update.method].close)
        await asyncio.to_thread(self.senders[update.method].send, update, iter(self.weights.items()))

    def holds(self, index):
        return self.runner.state.engines[f"engine-{index}"]

    def has(self, index, value):
        fake = self.fakes[index]
        return all(torch.equal(t, torch.full_like(t, value)) for t in fake.weights.values()) and fake.weights


@pytest.mark.parametrize(("colocate", "has_stream"), [(True, True), (False, True), (False, False)])
async def test_all_engines_get_every_version(colocate, has_stream):
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, has_stream=has_stream, colocate=colocate, update_weight_buffer_size=200)
        await fleet.add()
        await fleet.add(bracket=False)
        for version in (1, 2, 3):
            assert await fleet.update(float(version)) == version == fleet.runner.state.version
            for index, fake in enumerate(fleet.fakes):
                assert fleet.has(index, float(version)) and fake.version == str(version)
                assert fake.paused is None and not fake.session_open
        assert [update.new_group for update in fleet.updates] == [True, False, False]
        assert fleet.runner.seconds.keys() == {"pause", "flush", "open", "send", "commit", "close", "resume"}


async def test_engines_that_are_left_make_a_group_of_their_own():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, colocate=False)
        for _ in range(3):
            await fleet.add()
        await fleet.update(1.0)
        fleet.fakes[0].faults["/pause_generation"] = ["die"]
        await fleet.update(2.0)
        await fleet.update(3.0)
        assert fleet.has(1, 3.0) and fleet.has(2, 3.0)
        assert [target.rank_offset for target in fleet.updates[-1].engines] == [1, 2]
        assert [update.new_group for update in fleet.updates] == [True, True, False]


@pytest.mark.parametrize("colocate", [True, False])
@pytest.mark.parametrize("bucket", [1, 2, 5])
@pytest.mark.parametrize("fault", ["raise", "close", "die"])
async def test_an_engine_that_fails_at_any_bucket_of_a_stream_is_the_only_one_that_is_fenced(colocate, bucket, fault):
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, colocate=colocate, update_weight_buffer_size=16)
        for _ in range(3):
            await fleet.add()
        fleet.weights |= {f"more{number}": torch.zeros(4) for number in range(4)}
        await fleet.update(1.0)
        fleet.fakes[1].faults["bucket"] = [*[None] * (bucket - 1), fault]
        assert await fleet.update(2.0) == 2
        assert [name for name, _ in fleet.fenced] == ["engine-1"] and fleet.holds(1) is Holds.FENCED
        for index in (0, 2):
            assert fleet.holds(index) is Holds.CURRENT and fleet.has(index, 2.0)
            assert fleet.fakes[index].version == "2"
        assert await fleet.update(3.0) == 3 and fleet.has(0, 3.0) and fleet.has(2, 3.0)


@pytest.mark.parametrize("bucket", [1, 2, 3])
@pytest.mark.parametrize("fault", [500, "reset"])
async def test_an_engine_that_fails_at_any_request_takes_nothing_from_the_others(bucket, fault):
    """They have all weights of the version, or none would be committed."""
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, has_stream=False, colocate=False, update_weight_buffer_size=16)
        for _ in range(3):
            await fleet.add()
        fleet.weights |= {f"more{number}": torch.zeros(4) for number in range(4)}
        await fleet.update(1.0)
        fleet.fakes[1].faults["/update_weights_from_distributed"] = [*[None] * (bucket - 1), fault]
        assert await fleet.update(2.0) == 2
        assert [name for name, _ in fleet.fenced] == ["engine-1"] and fleet.holds(1) is Holds.FENCED
        for index in (0, 2):
            assert fleet.has(index, 2.0) and fleet.fakes[index].version == "2"
        assert await fleet.update(3.0) == 3


STEPS = {**PATHS, "flush": "/flush_cache"}


BOUND_S = 1.5
"""Of engines that hang, and so of those that do not: these answer in time on a busy machine, too."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["hang", "freeze"])
async def test_an_engine_that_hangs_at_any_step_is_fenced_in_time(step, fault):
    """``hang``: one request has no end; ``freeze``: it says nothing at all, any more."""
    bounds = {"hang": {"update_weight_timeout": BOUND_S}, "freeze": {"update_weight_silence_timeout": BOUND_S}}[fault]
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, **bounds)
        await fleet.add()
        await fleet.add()
        await fleet.update(1.0)
        fleet.fakes[1].faults[STEPS[step]] = [fault]
        async with asyncio.timeout(60.0):
            assert await fleet.update(2.0) == 2
        assert [name for name, _ in fleet.fenced] == ["engine-1"]
        if step != "send":
            told = f"said nothing for {BOUND_S} s" if fault == "freeze" else f"was not done within {BOUND_S} s"
            assert told in fleet.fenced[0][1]
        assert fleet.holds(0) is Holds.CURRENT and fleet.holds(1) is Holds.FENCED
        assert fleet.has(0, 2.0) and fleet.fakes[0].paused is None


@pytest.mark.parametrize(
    ("colocate", "has_stream", "at"),
    [
        (True, True, "bucket"),
        (False, True, "bucket"),
        (False, True, "/update_weights_from_tensor"),
        (False, False, "/update_weights_from_distributed"),
    ],
)
@pytest.mark.parametrize("fault", ["hang", "freeze"])
async def test_an_update_goes_on_without_an_engine_that_hangs_in_it(fault, colocate, has_stream, at):
    bounds = {"update_weight_timeout": BOUND_S, "update_weight_silence_timeout": BOUND_S}
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, has_stream=has_stream, colocate=colocate, update_weight_buffer_size=16, **bounds)
        for _ in range(2):
            await fleet.add()
        await fleet.update(1.0)
        fleet.fakes[1].faults[at] = [fault]
        async with asyncio.timeout(60.0):
            assert await fleet.update(2.0) == 2
        assert fleet.holds(0) is Holds.CURRENT and fleet.holds(1) is Holds.FENCED and fleet.has(0, 2.0)


async def test_an_engine_that_takes_long_and_answers_is_left_to_it():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, update_weight_silence_timeout=2.0)
        fake = await fleet.add()
        fake.slow_s = 4.0
        assert await fleet.update(1.0) == 1 and fleet.fenced == []


@pytest.mark.parametrize("step", PATHS)
@pytest.mark.parametrize("fault", [500, "die"])
async def test_an_engine_that_fails_at_any_step_is_fenced_and_the_other_goes_on(step, fault):
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack)
        await fleet.add()
        await fleet.add()
        await fleet.update(1.0)
        fleet.fakes[1].faults[PATHS[step]] = [fault]
        assert await fleet.update(2.0) == 2
        assert [name for name, _ in fleet.fenced] == ["engine-1"] and fleet.fenced[0][1]
        assert fleet.holds(0) is Holds.CURRENT and fleet.holds(1) is Holds.FENCED
        assert fleet.has(0, 2.0) and fleet.fakes[0].paused is None and fleet.fakes[0].version == "2"
        assert fleet.fakes[1].paused is not None or step == "pause", "it generates again"
        assert await fleet.update(3.0) == 3
        assert fleet.has(0, 3.0) and len(fleet.updates[-1].engines) == 1


async def test_the_last_engine_that_fails_ends_it_with_the_reason():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack)
        (await fleet.add()).faults["/update_weights_from_tensor"] = [500]
        with pytest.raises(NoEngineLeft, match="weight version 1") as caught:
            await fleet.update(1.0)
        assert "scripted 500" in caught.value.evidence and caught.value.fields["engines"] == ["engine-0"]
        assert fleet.runner.state.version == 0
        with pytest.raises(NoEngineLeft, match="weight version 1"):
            await fleet.update(1.0)


async def test_a_trainer_that_fails_is_what_is_told_and_no_engine_is_trusted():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack)
        await fleet.add()

        async def send(_):
            raise ZeroDivisionError("in the trainer")

        with pytest.raises(ZeroDivisionError, match="in the trainer"):
            await fleet.runner.update(send)
        assert fleet.holds(0) is Holds.FENCED and "in the trainer" in fleet.fenced[0][1]


async def test_an_engine_that_comes_later_takes_part_in_the_next_update_with_a_new_group():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, colocate=False)
        await fleet.add()
        await fleet.update(1.0)
        await fleet.add()
        await fleet.update(2.0)
        assert fleet.has(0, 2.0) and fleet.has(1, 2.0)
        assert [update.new_group for update in fleet.updates] == [True, True]


async def test_requests_wait_through_an_update_and_go_on():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack)
        fake = await fleet.add(token_s=0.005)
        async with EngineClient(fake.url, "key") as client:
            task = asyncio.ensure_future(client.generate([1, 2], {"max_new_tokens": 150}))
            await eventually(lambda: any(request.tokens for request in fake.requests.values()))
            await fleet.update(1.0)
            spans = (await task)["meta_info"]["weight_versions"]
        assert [span["version"] for span in spans] == ["default", "1"]


async def test_versions_do_not_go_back():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack)
        await fleet.add()
        assert await fleet.runner.update(fleet.send, 5) == 5
        with pytest.raises(UpdateOutOfOrder):
            await fleet.runner.update(fleet.send, 5)
        assert await fleet.runner.update(fleet.send) == 6


async def test_in_place_pausing_leaves_the_cache_alone():
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, pause_generation_mode="in_place")
        fake = await fleet.add()
        await fleet.update(1.0)
        assert fake.count("/flush_cache") == 0 and fake.version == "1"


def test_memory_files_carry_weights_on_one_machine_only():
    assert settings({"colocate": True})["method"] == "tensor"
    assert settings({"colocate": True, "device": "cpu"}, on_one_node=False)["method"] == "broadcast"
    assert settings({"colocate": True, "device": "cuda"}, on_one_node=False)["method"] == "tensor"
    assert settings({"colocate": False})["method"] == "broadcast"
