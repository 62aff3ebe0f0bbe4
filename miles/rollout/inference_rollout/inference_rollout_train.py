"""One training rollout: dynamic sampling with over-sampling, filters, and a stop that loses nothing.

Consumes prompt groups of the data source and answers of engines. Produces ``rollout_batch_size`` accepted groups; all
others go back to the data source, or are filtered with a reason. Waits for engines (bounded per request) and rewards;
after the target is met, for stragglers, for at most the state's ``straggler_deadline_s``. Invariant: when it returns or
raises, no request of it runs and each group that it took has an end or is among the accepted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

from miles.rollout.base_types import Group, RolloutFnTrainOutput
from miles.rollout.data_source import DataSource
from miles.rollout.engines import EnginesFail
from miles.rollout.filter_hub.base_types import as_filter_output
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.hooks import BadHookResult, load_hook
from miles.rollout.inference_rollout.inference_rollout_common import (
    GenerateState,
    generate_and_rm_group,
    is_engine_error,
)
from miles.rollout.tracked_source import TrackedDataSource, is_complete, reset_group
from miles.utils.http_utils import http_client, request_scope
from miles.utils.types import SampleStatus
from miles_agents.errors import ConfigError

logger = logging.getLogger(__name__)
_FINISHED = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED, SampleStatus.FAILED)
CLEAN_UP_S = 5.0
ABORTED_TRIES = 3
FRUITLESS_GROUPS = 1000
"""So many groups are filtered one after the other, at the least, before it is an error."""


class FilterKeepsNothing(ConfigError):
    """The dynamic sampling filter refuses one group after the other, from the beginning or from some group on."""

    code = "E-ROLL-015"


class NoMorePrompts(ConfigError):
    """The data source gave no prompts."""

    code = "E-ROLL-017"


def no_more_prompts(size: int) -> NoMorePrompts:
    """What to raise when a data source that was asked for so many groups gave none."""
    return NoMorePrompts(
        "the data source has no more prompts",
        evidence=f"get_samples({size}) gave none",
        advice="Let get_samples begin a new epoch when the data is used up.",
    )


class TrainRollout:
    """See the module's docstring. Made for one rollout; runs on the loop of user code."""

    def __init__(self, state: GenerateState, data_source: DataSource, rollout_id: int) -> None:
        self.state = state
        self.args = state.args
        self.source = data_source if isinstance(data_source, TrackedDataSource) else TrackedDataSource(data_source)
        self.rollout_id = rollout_id
        self.scope = f"train-{rollout_id}"
        self.target = int(self.args.rollout_batch_size)
        self.accepted: list[Group] = []
        self.dropped: list[Group] = []
        self.drops: Counter[str] = Counter()
        self._drops_in_a_row = 0
        self.returned: Counter[str] = Counter()
        self._pending: dict[asyncio.Task[Group], Group] = {}
        self._order: dict[asyncio.Task[Group], int] = {}
        self._started = 0
        self._aborts: Counter[int] = Counter()
        self._by_sample = self.args.rollout_submission_granularity == "sample"
        self._entries_under_way: dict[int, int] = {}
        self._entry_finished = asyncio.Event()

    async def run(self) -> RolloutFnTrainOutput:
        """Collect the rollout.

        Raises:
            HookFailed: User code raised. EnginesFail, FilterKeepsNothing.
        """
        request_scope.set(self.scope)
        self.state.reset()
        self.state.progress.begin("generate", self.rollout_id, self.target)
        try:
            while len(self.accepted) < self.target:
                await self._submit()
                await self._take_finished()
            await self._stop()
            self.accepted.sort(key=lambda group: flat(group)[0].index or 0)
            await self._call_hooks()
        except BaseException:
            await self._clean_up()
            raise
        finally:
            self.state.aborted = False
        return RolloutFnTrainOutput(samples=self.accepted, metrics=self._metrics())

    # -- collecting ------------------------------------------------------------------------------------------

    async def _submit(self) -> None:
        size = self.args.over_sampling_batch_size or self.target
        while (room := self._room()) > 0:
            for group in await asyncio.to_thread(self._take, room if self._by_sample and self._started else size):
                self._start(group)

    def _room(self) -> int:
        """Prompt groups that are missing: they are neither accepted nor under way.

        With ``--rollout-submission-granularity sample``, of a group under way only samples that are not finished count.
        """
        missing = self.target - len(self.accepted)
        if not self._by_sample:
            return missing - len(self._pending)
        size = int(self.args.n_samples_per_prompt)
        return (missing * size - sum(self._entries_under_way.values())) // size

    def _take(self, size: int) -> list[Group]:
        groups = self.source.get_samples(size)
        if not groups:
            raise no_more_prompts(size)
        return groups

    def _start(self, group: Group) -> None:
        if (self.args.true_on_policy_mode and self._is_stale(group)) or self._is_too_old(group):
            group = reset_group(group)
            self.returned["regenerated"] += 1
        if self.args.partial_rollout and self.args.mask_offpolicy_in_partial_rollout:
            _mask_what_is_there(group)
        number = id(group)
        self._entries_under_way[number] = len(group)

        def finished() -> None:
            if number in self._entries_under_way:
                self._entries_under_way[number] -= 1
            self._entry_finished.set()

        task = asyncio.ensure_future(
            generate_and_rm_group(self.state, group, self.state.sampling_params, on_entry=finished)
        )
        self._pending[task] = group
        self._order[task] = self._started
        self._started += 1
        self.state.pendings.add(task)

    def _is_stale(self, group: Group) -> bool:
        """Whether tokens of it are of another weight version than the engines have now."""
        version = self.state.weight_version
        if version is None:
            return False
        return any(not _same_version(v, version) for sample in flat(group) for v in sample.weight_versions)

    def _is_too_old(self, group: Group) -> bool:
        """Whether an answer of it is finished, and of weights that the trainer does not have (``--keep-old-actor``).
        One that goes on ends with the engines' own."""
        oldest = self.state.oldest_version
        if oldest is None:
            return False
        last = [s.weight_versions[-1] for s in flat(group) if s.weight_versions and s.status in _FINISHED]
        return any(not str(version).isdecimal() or int(version) < oldest for version in last)

    async def _take_finished(self) -> None:
        done = await self._wait()
        for task in sorted(done, key=self._order.__getitem__):
            group = self._forget(task)
            error = _error_of(task)
            if error is None:
                await self._judge(task.result(), group)
            elif is_engine_error(self.state, error):
                self._engine_failed(group, error)
            else:
                raise error

    async def _wait(self) -> set[asyncio.Task[Group]]:
        """Groups that are finished; none, if a sample is where that makes room."""
        if not self._by_sample:
            return (await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED))[0]
        self._entry_finished.clear()
        room = asyncio.ensure_future(self._entry_finished.wait())
        try:
            done, _ = await asyncio.wait({*self._pending, room}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            room.cancel()
        return {task for task in self._pending if task in done}

    def _forget(self, task: asyncio.Task[Group]) -> Group:
        self.state.pendings.discard(task)
        del self._order[task]
        group = self._pending.pop(task)
        self._entries_under_way.pop(id(group), None)
        return group

    async def _judge(self, made: Group, original: Group) -> None:
        """A group came back from generation: it is accepted, filtered, or goes back."""
        if len(self.accepted) >= self.target:
            self._give_back(made if is_complete(made) else self._unfinished(made, original), "surplus")
            return
        hook = self.state.dynamic_filter
        if hook is not None and (is_complete(made) or _is_ours_for_aborted(hook.path)):
            verdict = as_filter_output(await hook(self.args, made))
            if not verdict.keep:
                self._drop(made, verdict.reason or "filtered")
                return
        if any(s.status in (SampleStatus.ABORTED, SampleStatus.PENDING) for s in flat(made)):
            self._aborted_by_itself(made, original)
            return
        self.accepted.append(made)
        self._drops_in_a_row = 0
        self.state.progress.finished = len(self.accepted)

    def _aborted_by_itself(self, made: Group, original: Group) -> None:
        number = flat(original)[0].group_index or 0
        self._aborts[number] += 1
        if self._aborts[number] >= ABORTED_TRIES:
            self._drop(made, "aborted")
        else:
            self._give_back(self._unfinished(made, original), "aborted")

    def _drop(self, group: Group, reason: str) -> None:
        self.source.filtered([group], reason)
        self.dropped.append(group)
        self.drops[reason] += 1
        self.state.progress.filtered = self.drops.total()
        self._drops_in_a_row += 1
        if self._drops_in_a_row >= max(FRUITLESS_GROUPS, 50 * self.target):
            kept = f"{len(self.accepted)} of {self.target} were kept before" if self.accepted else "none was kept"
            raise FilterKeepsNothing(
                f"{self._drops_in_a_row} prompt groups in a row were filtered in rollout {self.rollout_id}; {kept}",
                evidence=", ".join(f"{reason}: {count}" for reason, count in self.drops.most_common(10)),
                advice="Look at rewards and answers (--save-debug-rollout-data); the task may be too hard or too easy, "
                "or --dynamic-sampling-filter-path too strict.",
            )

    def _engine_failed(self, group: Group, error: BaseException) -> None:
        self.state.engine_errors += 1
        self.state.progress.engine_errors = self.state.engine_errors
        logger.warning("prompt group %s: no engine answered; it is generated again", flat(group)[0].group_index)
        self._give_back(reset_group(group), "engine_error")
        if self.state.engine_errors > max(8, 2 * self.target):
            raise EnginesFail(
                f"{self.state.engine_errors} prompt groups of rollout {self.rollout_id} failed at the engines",
                evidence=str(getattr(error, "evidence", error)),
                advice="Look at the logs of router and engines.",
            ) from error

    def _give_back(self, group: Group, why: str) -> None:
        self.source.give_back([group], why)
        self.returned[why] += 1

    # -- stopping --------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """No new requests; those under way are aborted; what comes of it goes back to the data source."""
        self.state.aborted = True
        if not self._pending:
            return
        aborting = asyncio.ensure_future(self.state.engines.abort_all(self.scope))
        try:
            done, late = await asyncio.wait(self._pending, timeout=self.state.straggler_deadline_s)
        finally:
            aborting.cancel()
            await asyncio.gather(aborting, return_exceptions=True)
        for task in sorted(done, key=self._order.__getitem__):
            group = self._forget(task)
            error = _error_of(task)
            if error is not None and not is_engine_error(self.state, error):
                raise error
            made = task.result() if error is None else reset_group(group)
            complete = is_complete(made)
            self._give_back(made if complete else self._unfinished(made, group), "surplus" if complete else "stopped")
        await self._cancel_late(late)
        http_client().forget(self.scope)

    async def _cancel_late(self, late: set[asyncio.Task[Group]]) -> None:
        for task in late:
            task.cancel()
        if late:
            logger.warning("%d prompt groups did not stop within %.0f s", len(late), self.state.straggler_deadline_s)
            await asyncio.wait(late, timeout=CLEAN_UP_S)
        for task in late:
            self._give_back(reset_group(self._forget(task)), "late")

    def _unfinished(self, made: Group, original: Group) -> Group:
        """A group that was stopped, as it goes back: with ``--partial-rollout``, with what there is of it."""
        if not self.args.partial_rollout or any(isinstance(entry, list) for entry in made):
            return reset_group(original)
        for sample in made:
            if sample.response_length:
                sample.metadata.setdefault("start_rollout_id", self.rollout_id)
        return made

    async def _clean_up(self) -> None:
        """After an error or a cancellation: nothing of this rollout goes on, and its groups go back."""
        self.state.aborted = True
        pending = set(self._pending)
        for task in pending:
            task.cancel()
        self.state.pendings.clear()
        rids = http_client().in_flight(self.scope)
        http_client().forget(self.scope)
        work = [self.state.engines.abort(rids)] if rids else []
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await asyncio.gather(*pending, *work, return_exceptions=True)
        except TimeoutError:
            logger.warning("rollout %d: some of its tasks do not end", self.rollout_id)
        self.source.take_back_open(self.source.rollout_id, "failed")

    # -- the result ------------------------------------------------------------------------------------------

    async def _call_hooks(self) -> None:
        hook = load_hook(self.args.rollout_sample_filter_path, "--rollout-sample-filter-path")
        if hook is not None:
            await hook(self.args, self.accepted)
        hook = load_hook(self.args.rollout_all_samples_process_path, "--rollout-all-samples-process-path")
        if hook is not None:
            await hook(self.args, [*self.accepted, *self.dropped], self.source)

    def _metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = {f"rollout/dynamic_filter/drop_{k}": n for k, n in sorted(self.drops.items())}
        metrics |= {f"rollout/returned/{why}": n for why, n in sorted(self.returned.items())}
        if self.state.engine_errors:
            metrics["rollout/engine_errors"] = self.state.engine_errors
        return metrics


def _mask_what_is_there(group: Group) -> None:
    """Tokens of an answer that goes on do not count for the loss: other weights made them."""
    for sample in group:
        if not isinstance(sample, list) and sample.response_length and sample.status not in _FINISHED:
            sample.loss_mask = [0] * sample.response_length


def _error_of(task: asyncio.Task[Group]) -> BaseException | None:
    if not task.cancelled():
        return task.exception()
    # We cancel only what we do not look at any more: this came from inside.
    return BadHookResult(
        "the generation of a prompt group was cancelled by code in it",
        evidence="a generate or reward function raised asyncio.CancelledError, or cancelled its own task",
        advice="Let the function return an aborted sample, or raise another error.",
    )


def _same_version(said: str, version: int) -> bool:
    """Engines and user code write versions as text: numbers are compared as numbers."""
    return int(said) == version if str(said).isdecimal() else str(said) == str(version)


def _is_ours_for_aborted(path: str) -> bool:
    """Only this filter asks for groups that are not complete; others may stumble over missing rewards."""
    return path.endswith(".check_no_aborted")
