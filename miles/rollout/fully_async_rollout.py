"""``--fully-async``: generation goes on all the time; a rollout is what has been finished meanwhile.

A producer (``group_producer``) keeps engines busy and fills a bounded buffer; a call takes the oldest finished groups
out of it. Weights change while answers are written, so a group may have tokens of several weight versions. With
``--max-weight-staleness K``, no group is given out whose oldest token is more than K versions older than the weights
that it is trained against: older ones are generated again or dropped (``--async-unused-samples-handler``). All groups
of a rollout are judged together when it is complete (``admission``), because weights may change during the call, too,
and from then on they do not change before it is trained on. Tokens whose ``Sample.weight_versions`` tells nothing
count as made by the weights that engines had when the generation of their group began.
"""

from __future__ import annotations

from typing import Any

from miles.rollout.admission import staleness
from miles.rollout.base_types import (
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnInput,
    RolloutFnOutput,
    RolloutFnTrainOutput,
)
from miles.rollout.data_buffer import DataBuffer, DataBufferConstructorInput, FifoDataBuffer, buffer_capacity
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.group_producer import GroupProducer, most_in_vain
from miles.rollout.hooks import load_hook
from miles.rollout.inference_rollout.inference_rollout_common import GenerateState, SharedGenerateState
from miles.rollout.inference_rollout.inference_rollout_eval import evaluate
from miles.rollout.inference_rollout.inference_rollout_train import FilterKeepsNothing
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.misc import load_function

__all__ = ["DataBuffer", "DataBufferConstructorInput", "FullyAsyncRolloutFn", "staleness"]


class FullyAsyncRolloutFn:
    """See the module's docstring. The producer begins with the first call, and goes on between calls."""

    keeps_groups_open = True
    """Groups that were taken and are not in this rollout's result are under way: they are not lost."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        args = input.args
        self.args = args
        source = input.data_source
        self.source = source if isinstance(source, TrackedDataSource) else TrackedDataSource(source)
        self.state = GenerateState(args)
        SharedGenerateState.adopt(self.state)
        path = args.custom_async_data_buffer_path
        kind = load_function(path, flag="--custom-async-data-buffer-path") if path else FifoDataBuffer
        self.buffer: DataBuffer = kind(DataBufferConstructorInput(args, buffer_capacity(args)))
        self.producer = GroupProducer(self.state, self.source, self.buffer)

    async def __call__(self, input: RolloutFnInput) -> RolloutFnOutput:  # noqa: A002
        """Finished groups for a rollout; or an evaluation, during which no new groups are begun."""
        if isinstance(input, RolloutFnEvalInput):
            async with self.producer.paused():
                return await evaluate(self.state, input.rollout_id)
        self.state.weight_version = input.weight_version
        self.state.progress.begin("generate", input.rollout_id, int(self.args.rollout_batch_size))
        self.source.weights_are(input.weight_version)
        groups = await self._collect(input.rollout_id)
        groups.sort(key=lambda group: flat(group)[0].index or 0)
        hook = load_hook(self.args.rollout_sample_filter_path, "--rollout-sample-filter-path")
        if hook is not None:
            await hook(self.args, groups)
        return RolloutFnTrainOutput(groups, self._metrics(groups))

    async def close(self) -> None:
        """The producer ends."""
        await self.producer.close()

    async def _collect(self, rollout_id: int) -> list[Group]:
        """As many groups as a rollout has. They are admitted: weights stay as they are until they are trained on."""
        target, groups, num_old = int(self.args.rollout_batch_size), list[Group](), 0
        try:
            while True:
                while len(groups) < target:
                    groups += await self.producer.get(1)
                    # Not kept waiting for the rest: it never becomes younger.
                    num_old += self._without(groups, self.source.too_old(groups))
                    self._check_some_are_fresh(num_old, len(groups))
                    self.state.progress.finished = len(groups)
                too_old = self.source.admit(rollout_id, groups)
                if not too_old:
                    return groups
                num_old += self._without(groups, too_old)
        except BaseException:
            # Nobody trains on them: they wait in the data source, finished as they are.
            self.source.give_back(groups, "failed")
            raise

    def _without(self, groups: list[Group], too_old: list[Group]) -> int:
        """These are taken out of the rollout's groups: how many."""
        gone = {id(group) for group in too_old}
        groups[:] = [group for group in groups if id(group) not in gone]
        for group in too_old:
            self.producer.unused(group, "stale")
        return len(too_old)

    def _check_some_are_fresh(self, too_old: int, kept: int) -> None:
        if not kept and too_old >= most_in_vain(self.args):
            raise FilterKeepsNothing(
                f"all of {too_old} prompt groups were older than --max-weight-staleness allows; none was kept",
                evidence=f"--max-weight-staleness {self.args.max_weight_staleness}, engines have weight version "
                f"{self.source.admission.version}",
                advice="Raise --max-weight-staleness or --update-weights-interval, or lower "
                "--async-max-concurrent-samples and --async-data-buffer-capacity-factor.",
            )

    def _metrics(self, groups: list[Group]) -> dict[str, Any]:
        counts, self.producer.counts = self.producer.counts, type(self.producer.counts)()
        metrics: dict[str, Any] = {}
        for name, count in sorted(counts.items()):
            place = "dynamic_filter" if name.startswith("drop_") else "fully_async"
            metrics[f"rollout/{place}/{name}"] = float(count)
        admission = self.source.admission
        ages = [] if admission.version is None else [admission.age(group) for group in groups]
        if ages:
            metrics["rollout/fully_async/staleness/max"] = float(max(ages))
            metrics["rollout/fully_async/staleness/mean"] = sum(ages) / len(ages)
        metrics["rollout/fully_async/under_way"] = float(self.producer.num_under_way)
        return metrics | {f"rollout/fully_async/{name}": n for name, n in self.buffer.get_metrics().items()}
