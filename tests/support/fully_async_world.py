"""For tests of fully asynchronous training: engines, trainer and disk as a test decides, around the real producer,
buffer, admission, ledger, journal and recovery of a rollout manager. Nothing happens between two orders of the test."""

from __future__ import annotations

import asyncio
import itertools
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput, RolloutFnConstructorInput, RolloutFnTrainInput
from miles.rollout.batch_journal import Batch
from miles.rollout.data_source import DataSource
from miles.rollout.engines import Engines
from miles.rollout.fully_async_rollout import FullyAsyncRolloutFn
from miles.rollout.generate_hub import single_turn
from miles.rollout.hooks import Hook
from miles.rollout.journal import Journal
from miles.rollout.messages import RolloutBatchRefs
from miles.rollout.recovery import RolloutRecovery
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.http_utils import RequestFailed
from miles.utils.types import Sample
from support.rollout_cases import make_args

GROUP = 2
TARGET = 2
TURNS = 60
"""Passes of the loop after which nothing goes on by itself: there is no other thread, and no clock."""


class Numbers(DataSource):
    """One prompt after the other; what comes back is given out first. Its position is in a file of its own."""

    def __init__(self, args: Any) -> None:
        self.args, self.next, self.buffer = args, 0, list[Any]()

    def get_samples(self, num_samples: int) -> list[Any]:
        found = [self.buffer.pop(0) for _ in range(min(num_samples, len(self.buffer)))]
        while len(found) < num_samples:
            found.append(group_of(self.next))
            self.next += 1
        return found

    def add_samples(self, samples: list[Any]) -> None:
        self.buffer += samples

    def save(self, rollout_id: int) -> None:
        state = {"next": self.next, "buffer": [[s.to_dict() for s in group] for group in self.buffer]}
        (Path(self.args.save) / f"numbers_{rollout_id}.json").write_text(json.dumps(state, default=str))

    def load(self, rollout_id: int | None = None) -> None:
        state = json.loads((Path(self.args.load) / f"numbers_{rollout_id}.json").read_text())
        self.next = state["next"]
        self.buffer = [[Sample.from_dict(s) for s in group] for group in state["buffer"]]


def group_of(number: int) -> list[Sample]:
    return [Sample(group_index=number, index=number * GROUP + i, prompt=str(number)) for i in range(GROUP)]


class Request:
    """One that engines work on. Each of its tokens is a number that nothing else has."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.tokens: list[int] = []
        self.ends: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class EnginesAndTrainer:
    """What outlives a rollout manager. ``made_by`` is the truth: which weights made a token."""

    def __init__(self) -> None:
        self.version, self.announced = 1, 0
        self.made_by: dict[int, int] = {}
        self.requests: list[Request] = []
        self.num_trained_rollouts = 0
        self.trained: list[int] = []
        """Numbers of the groups, in order."""
        self._tokens = itertools.count()

    def work(self, request: Request) -> None:
        """A token more."""
        token = next(self._tokens)
        self.made_by[token] = self.version
        request.tokens.append(token)

    def finish_group(self, which: int) -> None:
        """All that is under way of one prompt is answered."""
        number = self.requests[which % len(self.requests)].sample.group_index
        for request in [r for r in self.requests if r.sample.group_index == number]:
            self.work(request)
            request.ends.set_result("stop")

    async def generate(self, input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002 - the name tells the form
        """As an engine answers: what it made so far also when it aborts, and spans if several weights made it."""
        sample, request = input.sample, Request(input.sample)
        self.requests.append(request)
        try:
            how = await request.ends
        finally:
            self.requests.remove(request)
        if how == "fails":
            raise RequestFailed("no engine answers", evidence="they are dead", advice="none", url="http://engine")
        sample.tokens += request.tokens
        sample.response_length += len(request.tokens)
        sample.reward = 1.0 if how == "stop" else None
        made_by = sorted({self.made_by[token] for token in request.tokens})
        spans = [{"version": str(v), "start": 0, "end": 1} for v in made_by]
        told = {"weight_version": str(self.version)} | ({"weight_versions": spans} if made_by != [self.version] else {})
        # Every fifth sample is of a generate function that says nothing of weights.
        says = {} if (sample.index or 0) % 5 == 4 else told
        sample.update_from_meta_info(input.args, {"finish_reason": {"type": how}, **says})
        return GenerateFnOutput(samples=sample)


class AtOnce(ThreadPoolExecutor):
    """Runs what it is given where it is given."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class ManagerLife:
    """What one process of the rollout manager has. ``call`` is ``generate`` under way, ``batch`` what came of it."""

    def __init__(self, world: EnginesAndTrainer, directory: Path, *, bound: int, handler: str) -> None:
        self.world = world
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(AtOnce())
        args = make_args(
            rollout_batch_size=TARGET, n_samples_per_prompt=GROUP, async_max_concurrent_samples=3 * GROUP,
            max_weight_staleness=bound, async_unused_samples_handler=handler, async_data_buffer_capacity_factor=1.0,
            data_source_path="support.Numbers", rm_type=None,
        )  # fmt: skip
        self.source = TrackedDataSource(Numbers(args))
        self.source.bound_staleness(bound)
        self.source.attach(Journal(directory / "journal.jsonl"))
        self.recovery = RolloutRecovery(args, self.source, directory / "recovery")
        self.function = FullyAsyncRolloutFn(RolloutFnConstructorInput(args, self.source))
        self.function.state.engines = Engines()
        # Ours, in that an aborted answer is asked for again.
        self.function.state.generate_hook = Hook("--", "engines", world.generate, origin=single_turn.generate)
        self.call: asyncio.Task[Any] | None = None
        self.batch: tuple[list[int], list[list[int]]] | None = None
        self.is_shipped = False

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def settle(self) -> None:
        """Everything that can go on does."""

        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.run(turns())

    def generate(self, rollout_id: int) -> None:
        """The loop asks for a rollout."""
        made = self.run(self.recovery.again(rollout_id))
        if made is not None:
            [part] = made.parts
            self.batch = part["groups"].tolist(), part["tokens"]
            self.is_shipped = True
            return
        self.source.begin(rollout_id)
        told = RolloutFnTrainInput(rollout_id, self.world.version)
        self.call = self.loop.create_task(self.function(told))
        self.settle()

    def select(self) -> None:
        """What the call gave goes to the trainer."""
        groups = self.call.result().samples
        self.call = None
        self.source.select(groups)
        numbers = [group[0].group_index for group in groups]
        self.batch = numbers, [[token for sample in group for token in sample.tokens] for group in groups]

    def ship(self, rollout_id: int) -> None:
        """Batch and state are on the disk."""
        numbers, tokens = self.batch
        part = {"groups": np.array(numbers), "tokens": tokens}
        self.run(self.recovery.shipped({}, rollout_id, Batch(RolloutBatchRefs([], {}, len(numbers)), [part])))
        self.is_shipped = True

    def end(self, *, dies: bool) -> None:
        """The process ends; one that dies writes nothing any more."""
        if dies:
            self.source.journal.close()
            self.source.journal = None
        if self.call is not None:
            self.call.cancel()
        self.run(self.function.close())
        self.settle()
        self.source.close()
        self.loop.close()
