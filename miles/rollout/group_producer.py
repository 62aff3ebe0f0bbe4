"""Generates prompt groups without end, for fully asynchronous training.

Consumes prompt groups of the data source and answers of engines; puts finished groups into the data buffer. Waits for
engines (bounded per request), rewards, and room in the buffer. Invariants: so many groups at most are under way as
``--async-max-concurrent-samples`` allows; each group that it took has an end in the ledger, is under way, or is in the
buffer. What ends it is ``close``, or an error, which whoever takes from the buffer gets to see.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from miles.rollout.admission import BEGUN_WITH, versions_of
from miles.rollout.base_types import Group
from miles.rollout.data_buffer import DataBuffer
from miles.rollout.engines import EnginesFail
from miles.rollout.filter_hub.base_types import as_filter_output
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.inference_rollout.inference_rollout_common import (
    GenerateState,
    generate_and_rm_group,
    is_engine_error,
)
from miles.rollout.inference_rollout.inference_rollout_train import (
    ABORTED_TRIES,
    CLEAN_UP_S,
    FRUITLESS_GROUPS,
    FilterKeepsNothing,
    no_more_prompts,
)
from miles.rollout.tracked_source import TrackedDataSource, is_complete, reset_group
from miles.utils.http_utils import http_client, request_scope
from miles.utils.types import SampleStatus

logger = logging.getLogger(__name__)
SCOPE = "produce"


class GroupProducer:
    """See the module's docstring. Lives on the loop of user code."""

    def __init__(self, state: GenerateState, source: TrackedDataSource, buffer: DataBuffer) -> None:
        self.state = state
        self.args = state.args
        self.source = source
        self.buffer = buffer
        self.limit = max(1, self._max_samples() // int(self.args.n_samples_per_prompt))
        self.counts: Counter[str] = Counter()
        """Since they were last taken: groups filtered, by reason, and given back, by why."""
        self._pending: dict[asyncio.Task[Group], Group] = {}
        self._may_submit = asyncio.Event()
        self._may_submit.set()
        self._submitting = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self._fruitless = 0
        """Groups in a row that came to nothing."""
        self._engine_errors = 0
        """In a row."""
        self._aborts: Counter[int] = Counter()
        """By the group's number: how often it came back unfinished by itself."""

    def _max_samples(self) -> int:
        given = self.args.async_max_concurrent_samples
        return int(given or int(self.args.rollout_batch_size) * int(self.args.n_samples_per_prompt))

    @property
    def num_under_way(self) -> int:
        """Groups."""
        return len(self._pending)

    def start(self) -> None:
        """Begin, or go on; nothing to do if it runs."""
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())

    async def get(self, num_groups: int) -> list[Group]:
        """Finished groups, from the buffer.

        Raises:
            What ended the producer: HookFailed, EnginesFail, FilterKeepsNothing, NoMorePrompts, and others.
        """
        self.start()
        assert self._running is not None
        taking = asyncio.ensure_future(self.buffer.get(num_groups))
        try:
            await asyncio.wait({taking, self._running}, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                return taking.result()
            self._running.result()
            raise AssertionError("a producer ends by an error only")
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No new groups are begun inside the block; those under way go on."""
        self._may_submit.clear()
        try:
            async with self._submitting:  # what is being taken right now is begun before the block
                pass
            yield
        finally:
            self._may_submit.set()

    async def close(self) -> None:
        """Nothing goes on; what is under way goes back to the data source."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def _run(self) -> None:
        request_scope.set(SCOPE)
        try:
            while True:
                await self._submit()
                await self._take_finished()
        finally:
            await self._clean_up()

    async def _submit(self) -> None:
        async with self._submitting:
            room = self.limit - len(self._pending)
            if room <= 0 or not self._may_submit.is_set():
                return
            groups = await asyncio.to_thread(self.source.get_samples, room)
            if not groups and not self._pending:
                raise no_more_prompts(room)  # as long as groups are under way, some may come back
            for group in groups:
                task = asyncio.ensure_future(self._generate(group))
                self._pending[task] = group

    async def _generate(self, group: Group) -> Group:
        version = self.source.serving
        for sample in flat(group):
            if sample.status not in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED):
                sample.metadata.pop(BEGUN_WITH, None)  # of a generation that was thrown away
        made = await generate_and_rm_group(self.state, group, self.state.sampling_params)
        for sample in flat(made):
            if version is not None and not versions_of(sample):
                sample.metadata[BEGUN_WITH] = version
        return made

    async def _take_finished(self) -> None:
        resumed = asyncio.ensure_future(self._may_submit.wait()) if not self._may_submit.is_set() else None
        try:
            waits = [*self._pending, *([] if resumed is None else [resumed])]
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if resumed is not None:
                resumed.cancel()
        for task in [task for task in self._pending if task in done]:
            group = self._pending[task]
            try:
                await self._end(task, group)
            except (FilterKeepsNothing, EnginesFail):
                del self._pending[task]  # the last straw has its end, too
                raise
            # Only now: what is waiting for room in the buffer is still ours to give back.
            del self._pending[task]

    async def _end(self, task: asyncio.Task[Group], group: Group) -> None:
        try:
            await self._judge(task.result(), group)
        except BaseException as error:
            if not is_engine_error(self.state, error):
                raise
            self._engine_failed(group, error)

    async def _judge(self, made: Group, original: Group) -> None:
        if not is_complete(made):
            self._aborted_by_itself(original)
            return
        hook = self.state.dynamic_filter
        if hook is not None:
            verdict = as_filter_output(await hook(self.args, made))
            if not verdict.keep:
                self._filter(made, verdict.reason or "filtered")
                return
        self._fruitless = self._engine_errors = 0
        self._aborts.pop(_number(original), None)
        self.source.finished(made)
        await self.buffer.put(made)

    def unused(self, group: Group, why: str) -> None:
        """A finished group cannot be trained on any more: by ``--async-unused-samples-handler`` it is generated again,
        or dropped."""
        self._unused(group, why)

    def _aborted_by_itself(self, group: Group) -> None:
        self._aborts[_number(group)] += 1
        if self._aborts[_number(group)] >= ABORTED_TRIES:
            del self._aborts[_number(group)]
            self.counts["drop_aborted"] += 1
            self.source.filtered([group], "aborted")
        else:
            self._unused(group, "aborted")
        self._in_vain("came back unfinished or were filtered")

    def _unused(self, group: Group, why: str) -> None:
        self.counts[why] += 1
        if self.args.async_unused_samples_handler == "retry":
            self.source.give_back([reset_group(group)], why)
        else:
            self.source.filtered([group], why)

    def _filter(self, group: Group, reason: str) -> None:
        self.counts[f"drop_{reason}"] += 1
        self.source.filtered([group], reason)
        self._in_vain("were filtered")

    def _in_vain(self, what: str) -> None:
        self._fruitless += 1
        if self._fruitless >= most_in_vain(self.args):
            raise FilterKeepsNothing(
                f"{self._fruitless} prompt groups in a row {what}",
                evidence=", ".join(f"{name}: {count}" for name, count in self.counts.most_common(10)),
                advice="Look at rewards and answers (--save-debug-rollout-data); the task may be too hard or too easy, "
                "--dynamic-sampling-filter-path too strict, or a generate function leaves its samples unfinished.",
            )

    def _engine_failed(self, group: Group, error: BaseException) -> None:
        self._engine_errors += 1
        self.state.progress.engine_errors += 1
        self.counts["engine_error"] += 1
        logger.warning("prompt group %s: no engine answered; it is generated again", flat(group)[0].group_index)
        self.source.give_back([reset_group(group)], "engine_error")
        if self._engine_errors > max(8, 2 * int(self.args.rollout_batch_size)):
            raise EnginesFail(
                f"{self._engine_errors} prompt groups in a row failed at the engines",
                evidence=str(getattr(error, "evidence", error)),
                advice="Look at the logs of router and engines.",
            ) from error

    async def _clean_up(self) -> None:
        for task in self._pending:
            task.cancel()
        rids = http_client().in_flight(SCOPE)
        http_client().forget(SCOPE)
        work = [self.state.engines.abort(rids)] if rids else []
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await asyncio.gather(*self._pending, *work, return_exceptions=True)
        except TimeoutError:
            logger.warning("some groups under way do not end")
        groups = [reset_group(group) for group in self._pending.values()]
        self._pending.clear()
        self.source.give_back(groups, "stopped")


def most_in_vain(args: Namespace) -> int:
    """So many groups in a row may come to nothing before a run ends with the reason."""
    return max(FRUITLESS_GROUPS, 50 * int(args.rollout_batch_size))


def _number(group: Group) -> int:
    return flat(group)[0].group_index or 0
