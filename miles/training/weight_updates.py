"""Hands the trainer's weights to the engines, in the loop's own task: in its turn, or at once while it waits.

Consumes: the parts of the job, all ready. Produces: weight versions, their timings, orders to engines; the rollout
manager's view of both. Waits for: trainer and engines (deadlines of ``fleet``). Invariants: a version is on all engines
that serve, or on none; a rollout that was judged by the weights of one version is trained on before there is another.

In a colocated run memory changes hands around it: see ``loop``.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.training.parts import Parts
from miles.training.stopwatch import Stopwatch


class Shows(Protocol):
    """What is shown to a person."""

    def say(self, text: str, /) -> None:
        """A line."""

    def phase(self, name: str, /) -> AbstractContextManager[Any]:
        """What goes on inside."""


class WeightUpdates:
    """See the module's docstring.

    Args:
        trainer: Its calls; None: a run without trainer.
        rollout: Those of the rollout manager.
    """

    def __init__(self, parts: Parts, config: Mapping[str, Any], console: Shows, *, trainer: Any, rollout: Any) -> None:
        self.parts = parts
        self.config = config
        self.console = console
        self.trainer = trainer
        self.rollout = rollout
        self.is_due = False
        """The trainer has trained since engines got its weights."""

    async def update(self, watch: Stopwatch) -> dict[str, float]:
        """The trainer's weights become those of all engines, memory changing hands around it."""
        trainer, fleet = self._needed_trainer(), self.parts.fleet
        if fleet is None:
            raise AssertionError("weights are updated only where there are engines")
        sleeps = self.config["offload_train"]
        memory: dict[str, float] = {}
        if sleeps:
            with watch.measure("offload"):
                memory["perf/trainer_rss_awake"] = (await trainer.sleep.call(1)).at(gpus=0)["rss_before"]
        if self.config["offload_rollout"]:
            with watch.measure("offload"):
                await fleet.resume_memory("weights")
        with watch.measure("update_weights"), self.console.phase("update"):
            timings = await self._send_weights()
        if self.config["check_weight_update_equal"]:
            await self._check_weights()
        if sleeps:
            with watch.measure("offload"):
                memory["perf/trainer_rss_asleep"] = (await trainer.sleep.call(2)).at(gpus=0)["rss_after"]
        if self.config["offload_rollout"]:
            with watch.measure("offload"):
                await fleet.resume_memory("kv_cache")
        return memory | {f"perf/update_weights/{name}_time": seconds for name, seconds in timings.items()}

    async def _send_weights(self) -> dict[str, float]:
        fleet = self.parts.fleet
        timings: dict[str, float] = {}
        if fleet is not None and not self.config.get("debug_skip_weight_update"):
            before = fleet.targets
            send = self._sender(timings)
            version = await fleet.weight_update(send, version=self._next_version())
            self.is_due = False
            await self.rollout.set_weight_version.call_one(version)
            if self.parts.recovery is not None:
                self.parts.recovery.next_version = 0
            if fleet.targets != before and fleet.recovery is None:
                await self._use_fewer_engines(before)
        return timings

    def _sender(self, timings: dict[str, float]) -> Callable[[WeightUpdate], Awaitable[None]]:
        trainer = self._needed_trainer()

        async def send(update: WeightUpdate) -> None:
            answers = await trainer.update_weights.call(update)
            timings.update(answers.at(gpus=0))

        return send

    def can_catch_up(self) -> bool:
        """The trainer has the engines' weights, and has them in memory."""
        return self.trainer is not None and not self.is_due and not self.config["offload_train"]

    async def catch_up(self) -> None:
        """Engines that have come back get the version of the others, and requests."""
        if self.parts.fleet is not None:
            await self.parts.fleet.catch_up(self._sender({}))

    def _next_version(self) -> int:
        fleet = self.parts.fleet
        return max(0 if fleet is None else fleet.weight_version, self.parts.weight_version) + 1

    async def update_at_once(self) -> bool:
        """No engine serves, and those that have come back wait for weights that only an update can give.

        False: it must not be, since a rollout that was judged by the weights of now is on its way here."""
        if self.trainer is None or self.parts.fleet is None:
            return False
        if not await self._announced(self._next_version()):
            return False
        if self.config["offload_train"]:
            await self.parts.fleet.release()
            await self.trainer.wake_up.call()
        await self.update(Stopwatch())
        return True

    async def _announced(self, version: int) -> bool:
        """The rollout manager judges by this version from now on; so does its successor, if it dies before the update.
        False: it does not."""
        recovery = self.parts.recovery
        if recovery is not None:
            recovery.next_version = version
        may_be: bool = False
        try:
            may_be = await self.rollout.may_become.call_one(version)
        finally:
            if recovery is not None and not may_be:
                recovery.next_version = 0
        return may_be

    async def _use_fewer_engines(self, before: list[EngineTarget]) -> None:
        """Some engines failed in the update and are fenced: requests go to the others."""
        fleet = self.parts.fleet
        if fleet is not None:
            lost = sorted({target.name for target in before} - {target.name for target in fleet.targets})
            self.console.say(f"warning: {', '.join(lost)} failed in a weight update; the run goes on without")
            await self.rollout.set_engines.call_one(fleet.targets, fleet.router_url, fleet.api_key)

    async def _check_weights(self) -> None:
        """``--check-weight-update-equal``: each engine holds what it loads from an export of the trainer's weights.

        As it holds that export from then on, a tensor that no update brings differs after the next step. Gradients and
        optimizer are put away again as they were before."""
        trainer, fleet = self._needed_trainer(), self.parts.fleet
        export = Path(self.config["run_dir"]) / "weight_check"
        try:
            await trainer.export_hf.call(str(export))
            if fleet is not None:
                await fleet.check_equal(export)
        finally:
            await asyncio.to_thread(shutil.rmtree, export, ignore_errors=True)
        if self.config["offload_train"]:
            await trainer.sleep.call(1)
        version = 0 if fleet is None else fleet.weight_version
        self.console.say(f"weight version {version} checked: the engines hold exactly the trainer's weights")

    def _needed_trainer(self) -> Any:
        if self.trainer is None:
            raise AssertionError("only called where there is a trainer")
        return self.trainer
