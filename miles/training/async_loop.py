"""The asynchronous training loops (``train_async.py``): engines generate while the trainer trains.

One step ahead: the next rollout is generated while this one is trained on; weights are handed over between rollouts,
every ``--update-weights-interval`` of them, when the rollout under way is complete. So a rollout is trained on with
weights that are at most the interval newer than those that generated it.

``--fully-async``: the rollout function generates all the time (``miles.rollout.fully_async_rollout``), a rollout is
what was finished meanwhile, and weights change while answers are written. What bounds their age is
``--max-weight-staleness``.

Both need devices of their own for trainer and engines. What else an iteration does, and what is waited for, is as in
``loop``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from miles.rollout.messages import RolloutBatchRefs
from miles.training.loop import Outcome, TrainingLoop
from miles.training.stopwatch import Stopwatch


class AsyncTrainingLoop(TrainingLoop):
    """See the module's docstring. Invariant: at most one rollout is generated ahead of the one that is trained on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ahead: asyncio.Task[RolloutBatchRefs] | None = None

    async def run(self) -> Outcome:
        """All iterations. However it ends, nothing is generated any more."""
        try:
            return await super().run()
        finally:
            if self._ahead is not None:
                self._ahead.cancel()
                await asyncio.gather(self._ahead, return_exceptions=True)

    async def _next_batch(self, rollout_id: int) -> RolloutBatchRefs:
        if self.config["fully_async"]:
            return await self._generate(rollout_id)
        ahead = self._ahead or self._begin(rollout_id)
        self._ahead = None
        batch: RolloutBatchRefs = await self._shown("generate", ahead)
        if rollout_id + 1 < self._end:
            self._ahead = self._begin(rollout_id + 1)
        return batch

    def _begin(self, rollout_id: int) -> asyncio.Task[RolloutBatchRefs]:
        return asyncio.ensure_future(self._called(rollout_id))

    def _is_update_due(self, rollout_id: int) -> bool:
        return (rollout_id + 1) % int(self.config["update_weights_interval"]) == 0

    async def _before_update(self, watch: Stopwatch) -> None:
        if self._ahead is not None:
            with watch.measure("rollout_ahead"):
                await self.engines.until_update(self._ahead)


def loop_class(config: Mapping[str, Any]) -> type[TrainingLoop]:
    """By the entry point: ``train.py`` or ``train_async.py``."""
    return AsyncTrainingLoop if config.get("train_async") else TrainingLoop
