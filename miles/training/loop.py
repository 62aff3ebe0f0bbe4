"""The synchronous training loop: generate, train, save, hand the new weights to the engines, evaluate; again.

Consumes: the parts of the job, all ready. Produces: metrics per iteration, checkpoints. Waits for: calls to rollout
manager and trainer, orders to engines; a death among them ends the wait (``watch``). Invariants: the weights that
engines generate with are those of the last finished iteration; a checkpoint's tracker names it only when its rollout
state is on disk, too; batches are removed from the store when they have been trained on.

In a colocated run memory changes hands around training: engines give theirs back before the trainer takes its own;
afterwards the trainer gives up gradients and optimizer state, engines take room for weights, the weights are moved, the
trainer gives up its parameters, and engines take room for the KV cache.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.rollout.messages import EvalResult, RolloutBatchRefs
from miles.tracking.hub import Tracking
from miles.tracking.metric_check import MetricCheck
from miles.tracking.narrator import Narrator
from miles.tracking.trace import ENGINES, EVALUATE, GENERATE, LOOP, TRAINER
from miles.training.engine_recovery import EngineRecovery
from miles.training.parts import LOAD_S, Parts
from miles.training.schedule import Cadence, Iteration, iterations
from miles.training.stopwatch import Stopwatch
from miles.training.weight_updates import WeightUpdates
from miles_agents.errors import MilesError

logger = logging.getLogger(__name__)
_POLL_S = 0.2
SOON_S = 60.0
"""For questions that are answered at once, whatever else goes on."""


@dataclass
class Outcome:
    """What a run has come to: evaluations by metric name, before and after, and a few answers."""

    num_iterations: int = 0
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


class TrainingLoop:
    """See the module's docstring."""

    def __init__(self, parts: Parts, config: dict[str, Any], tracking: Tracking, console: Narrator) -> None:
        self.parts = parts
        self.config = config
        self.tracking = tracking
        self.console = console
        self.outcome = Outcome()
        self._check = MetricCheck(config["ci_metric_checker_key"], config["ci_metric_checker_threshold"])
        self._noted: set[str] = set()
        self._end = 0
        """Behind the last rollout of this process."""
        self.rollout = parts.calls(parts.rollout)
        self.trainer = None if parts.trainer is None else parts.calls(parts.trainer)
        self.weights = WeightUpdates(parts, config, console, trainer=self.trainer, rollout=self.rollout)
        self.engines = EngineRecovery(
            parts,
            catch_up=self.weights.catch_up,
            update=self.weights.update_at_once,
            can_catch_up=self.weights.can_catch_up,
            say=console.say,
        )

    async def run(self) -> Outcome:
        """All iterations."""
        self.console.shows_reward = self.config["loss_type"] != "sft_loss"
        with self.console.bars(self.config["num_rollout"], self.parts.start_rollout_id):
            async with self.engines.telling():
                return await self._run()

    async def _run(self) -> Outcome:
        config, parts = self.config, self.parts
        cadence = Cadence.of(
            config,
            trains=self.trainer is not None,
            generates=parts.fleet is not None,
            num_rollout_per_epoch=parts.num_rollout_per_epoch,
        )
        if self.trainer is not None and parts.fleet is not None:
            watch = Stopwatch()
            await self.weights.update(watch)
            self.tracking.trace.add(LOOP, watch.spans.take())
        num_rollout = self._num_rollout()
        start = parts.start_rollout_id
        if start >= num_rollout:
            if num_rollout == 0 and parts.fleet is not None and config["eval_interval"] is not None:
                await self._evaluate(0, 0)
            else:
                self.console.say(f"nothing left to do: {start} of {num_rollout} rollouts are done")
        stop_after = config.get("debug_exit_after_rollout")
        planned = list(iterations(cadence, start=start, num_rollout=num_rollout, stop_after=stop_after))
        self._end = planned[-1].rollout_id + 1 if planned else start
        for iteration in planned:
            await self._iterate(iteration)
            self.outcome.num_iterations += 1
            self.console.advance(iteration.rollout_id + 1)
        self._check.verdict()
        return self.outcome

    def _num_rollout(self) -> int:
        """As given, or as many as the prompts make that were not left out for their length."""
        config, per_epoch = self.config, self.parts.num_rollout_per_epoch
        if not config["num_rollout_derived"] or per_epoch is None:
            return int(config["num_rollout"])
        return min(int(config["num_rollout"]), max(1, per_epoch) * int(config["num_epoch"] or 1))

    async def _iterate(self, iteration: Iteration) -> None:
        rollout_id, parts = iteration.rollout_id, self.parts
        if iteration.evaluate_before:
            await self._evaluate(rollout_id, rollout_id)
        watch = Stopwatch()
        with watch.measure("rollout"):
            batch = await self._next_batch(rollout_id)
        metrics: dict[str, float] = dict(batch.metrics)
        steps: list[dict[str, float]] = []
        if self.trainer is not None:
            metrics.update(await self._train(rollout_id, batch.refs, watch))
            steps = await self._steps_of_it()
        elif parts.recovery is not None:
            parts.recovery.trained = rollout_id
        await self.rollout.trained.call_one(rollout_id)
        asked = self._is_save_asked_for()
        if iteration.save or asked:
            with watch.measure("save"), self.console.phase("save"):
                await self._save(rollout_id)
            if asked:
                await asyncio.to_thread(Path(self.config["save_trigger_sentinel"]).unlink, missing_ok=True)
        elif parts.recovery is not None:
            with watch.measure("save"):
                await parts.recovery.after(rollout_id)
        if self.trainer is not None and parts.fleet is not None and self._is_update_due(rollout_id):
            await self._before_update(watch)
            metrics.update(await self.weights.update(watch))
        metrics.update(watch.metrics())
        await self._trace(rollout_id, watch)
        self.tracking.write("rollout", rollout_id, rollout_id + 1, metrics, steps)
        self.console.measured(rollout_id, self.config["num_rollout"], metrics)
        if iteration.is_told:
            self.console.step(rollout_id, self.config["num_rollout"], metrics)
        if iteration.evaluate_after:
            await self._evaluate(rollout_id, rollout_id + 1)

    async def _trace(self, rollout_id: int, watch: Stopwatch) -> None:
        """What the controller, the trainer's first rank and the engines did in this iteration."""
        trace = self.tracking.trace
        trace.add(LOOP, [(*span[:3], {"rollout_id": rollout_id}) for span in watch.spans.take()])
        rollout, trainer = self.parts.rollout, self.parts.trainer
        tracks = [(ENGINES, self.parts.now(rollout))]
        if trainer is not None:
            tracks.append((TRAINER, self.parts.now(trainer).slice(gpus=0)))
        for track, mesh in tracks:
            try:
                trace.add(track, await mesh.options(timeout_s=SOON_S).spans.call_one())
            except MilesError as error:  # a run is no worse for it, and nobody is woken or begun anew for a picture
                logger.info("%s is missing in the trace: %s", track, error.what)

    def _is_save_asked_for(self) -> bool:
        """``--save-trigger-sentinel``: somebody has put the file there. It goes when the checkpoint is complete."""
        path: str | None = self.config.get("save_trigger_sentinel")
        return path is not None and self.trainer is not None and Path(path).exists()

    async def _next_batch(self, rollout_id: int) -> RolloutBatchRefs:
        return await self._generate(rollout_id)

    def _is_update_due(self, rollout_id: int) -> bool:
        return True

    async def _before_update(self, watch: Stopwatch) -> None:
        """Whatever must not go on while weights change."""

    async def _generate(self, rollout_id: int) -> RolloutBatchRefs:
        batch: RolloutBatchRefs = await self._shown("generate", self._called(rollout_id))
        return batch

    async def _called(self, rollout_id: int) -> RolloutBatchRefs:
        began = time.time()
        batch: RolloutBatchRefs = await self.rollout.generate.call_one(rollout_id)
        self.tracking.trace.add(GENERATE, [("generate", began, time.time(), {"rollout_id": rollout_id})])
        return batch

    async def _shown(self, phase: str, call: Any) -> Any:
        """Wait for a call of the rollout manager, showing how far it is. Engines that come back get weights."""
        called = asyncio.ensure_future(_awaited(call))
        task = asyncio.ensure_future(self.engines.result_of(called))
        try:
            with self.console.phase(phase):
                while self.console.has_bars and not task.done():
                    await asyncio.wait({task}, timeout=_POLL_S)
                    if not task.done():
                        await self._show_progress()
                return await task
        finally:
            task.cancel()
            called.cancel()

    async def _show_progress(self) -> None:
        """Whatever comes of it: what ends the run is the call itself."""
        rollout = self.parts.now(self.parts.rollout).options(timeout_s=30.0)
        with suppress(MilesError):
            self.console.show(await rollout.progress.call_one())

    async def _train(self, rollout_id: int, refs: list[Any], watch: Stopwatch) -> dict[str, float]:
        trainer, fleet = self._needed_trainer(), self.parts.fleet
        if fleet is not None and self.config["offload_rollout"]:
            with watch.measure("offload"):
                self._note_once((await fleet.release())["why"])
        if self.config["offload_train"] and fleet is not None:
            with watch.measure("offload"):
                await trainer.wake_up.call()
        self.weights.is_due = True
        with watch.measure("train"), self.console.phase("train"):
            answers = await trainer.train.call(rollout_id, refs)
        if self.parts.recovery is not None:
            self.parts.recovery.trained = rollout_id  # ranks that begin anew from now on are brought here
        return dict(answers.at(gpus=0))

    async def _steps_of_it(self) -> list[dict[str, float]]:
        """Metrics of each optimizer step of the rollout that was trained on, if it had several."""
        if self.parts.trainer is None or self.config["num_steps_per_rollout"] in (None, 1):
            return []
        first = self.parts.calls(self.parts.trainer, SOON_S).slice(gpus=0)
        steps: list[dict[str, float]] = await first.last_steps.call_one()
        return steps

    async def _save(self, rollout_id: int) -> None:
        """The rollout state first: the trainer's checkpoint makes it count, and the commit only tidies up."""
        trainer = self._needed_trainer()
        await self.parts.calls(self.parts.rollout, LOAD_S).save.call_one(rollout_id, self.config["save"])
        paths = await trainer.save.call(rollout_id)
        if self.parts.recovery is not None:  # at once: ranks that die from now on begin from here
            await self.parts.recovery.saved(rollout_id)
        await self.rollout.commit_save.call_one(rollout_id, self.config["save"])
        self.tracking.saved(self.config["save"])
        self.console.saved(rollout_id, str(paths.at(gpus=0)))
        export = None
        if self.config["save_hf"]:
            export = self.config["save_hf"].format(rollout_id=rollout_id)
            await trainer.export_hf.call(export)
            self.console.exported(rollout_id, export)
        if self.config.get("custom_megatron_post_save_hook_path"):
            await trainer.slice(gpus=0).after_save.call_one(rollout_id, paths.at(gpus=0), export)

    async def _evaluate(self, rollout_id: int, rollouts_done: int) -> None:
        began, at = time.perf_counter(), time.time()
        call = self.rollout.evaluate.call_one(rollout_id)
        result: EvalResult = await self._shown("evaluate", call)
        self.tracking.trace.add(EVALUATE, [("evaluate", at, time.time(), {"rollout_id": rollout_id})])
        metrics = {**result.metrics, "perf/eval_time": time.perf_counter() - began}
        self.tracking.write("eval", rollout_id, rollouts_done, metrics)
        self.tracking.examples(rollout_id, result.examples)
        self._check.see(metrics)
        self.console.evaluated(rollouts_done, metrics)
        if not self.outcome.first_eval:
            self.outcome.first_eval = dict(metrics)
        self.outcome.last_eval, self.outcome.examples = dict(metrics), list(result.examples)

    def _note_once(self, text: str) -> None:
        if text and text not in self._noted:
            self._noted.add(text)
            self.console.say(f"note: {text}")

    def _needed_trainer(self) -> Any:
        if self.trainer is None:
            raise AssertionError("only called where there is a trainer")
        return self.trainer


async def _awaited(call: Any) -> Any:
    return await call
