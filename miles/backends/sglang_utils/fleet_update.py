"""Carries out what ``weight_versions`` decides: the transaction that gives all engines new weights. No torch.

Waits for: engines, each call with a deadline; the trainer, whose call the owner of ``send`` bounds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from miles.backends.sglang_utils.client import PauseMode
from miles.backends.sglang_utils.fleet_parts import Engine
from miles.backends.weight_update.failures import EnginesMissedUpdate
from miles.backends.weight_update.messages import EngineTarget, UpdateMethod, WeightUpdate
from miles_agents.errors import MilesError, PeerFault
from miles_controller import weight_versions as versions
from miles_controller.weight_versions import Step

logger = logging.getLogger(__name__)
Send = Callable[[WeightUpdate], Awaitable[Any]]


class NoEngineLeft(PeerFault):
    """No engine has come through a weight update."""

    code = "E-ENG-007"


class Fences(Protocol):
    """What takes an engine out."""

    async def __call__(self, engine: Engine, why: str) -> None:
        """Nothing comes from or goes to this engine any more."""


class UpdateRunner:
    """Keeps the versions of a fleet's engines, and runs one update at a time."""

    def __init__(self, *, mode: PauseMode, method: UpdateMethod, bucket_bytes: int, fence: Fences) -> None:
        self.state = versions.Versions()
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        """Of the last update, by step."""
        self._engines: dict[str, Engine] = {}
        self.mode: PauseMode = mode
        self._method: UpdateMethod = method
        self._bucket_bytes = bucket_bytes
        self._fence = fence
        self._grouped: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    def joined(self, engine: Engine, version: int | None) -> None:
        """A new engine that holds this version."""
        self._engines[engine.target.name] = engine
        self.state, _ = versions.step(self.state, versions.Joined(engine.target.name, version))

    async def failed(self, name: str, why: str) -> None:
        """An engine has died."""
        await self._take(versions.EngineFailed(name, why), None)

    async def update(self, send: Send, version: int | None = None) -> int:
        """One update to ``version`` (default: the next). Returns it.

        Raises:
            NoEngineLeft: with every engine's failure.
            What ``send`` raises, if it is no failure of engines: nobody knows what they hold, so all are fenced.
        """
        async with self._lock:
            wanted = self.state.version + 1 if version is None else version
            self.failures, self.seconds = {}, {}
            error = await self._take(versions.Begin(wanted), send)
            if error is not None:
                raise error
            return wanted

    async def _take(self, event: versions.Event, send: Send | None) -> BaseException | None:
        """Carry out an event's effects, and those of the events that come of them. Returns what ``send`` raised."""
        pending: list[versions.Event] = [event]
        raised: BaseException | None = None
        while pending:
            self.state, effects = versions.step(self.state, pending.pop(0))
            for effect in effects:
                at = time.perf_counter()
                match effect:
                    case versions.Do(step, engines, number):
                        pending += await self._do(step, engines, number)
                        self.seconds[step.value] = time.perf_counter() - at
                    case versions.Send(engines, number):
                        answer, raised = await self._send(send, engines, number)
                        pending.append(answer)
                        self.seconds[Step.SEND.value] = time.perf_counter() - at
                    case versions.Fence(engine, why):
                        self.failures[engine] = why
                        await self._fence(self._engines[engine], why)
                    case versions.Finished(number, engines):
                        raised = raised if engines or raised is not None else self._none_left(number)
        return raised

    async def _do(self, step: Step, names: tuple[str, ...], version: int) -> list[versions.Event]:
        return list(await asyncio.gather(*(self._do_one(step, self._engines[name], version) for name in names)))

    async def _do_one(self, step: Step, engine: Engine, version: int) -> versions.Event:
        name = engine.target.name
        try:
            await self._call(step, engine, version)
        except MilesError as error:
            return versions.EngineFailed(name, f"{error.what}: {error.evidence}")
        return versions.StepDone(name, step)

    async def _call(self, step: Step, engine: Engine, version: int) -> None:
        client, bracket = engine.client, engine.target.has_bracket
        match step:
            case Step.PAUSE:
                await engine.service.pause()
                await client.pause(self.mode)
            case Step.FLUSH if self.mode != "in_place":  # there it would wait for the requests that stand still
                await client.flush_cache()
            case Step.OPEN if bracket:
                await client.begin_weight_update()
            case Step.COMMIT:
                await client.update_weight_version(version)
            case Step.CLOSE if bracket:
                await client.end_weight_update()
            case Step.RESUME:
                await client.resume()
                await engine.service.resume()
            case _:
                pass

    async def _send(
        self, send: Send | None, names: tuple[str, ...], version: int
    ) -> tuple[versions.Event, BaseException | None]:
        assert send is not None
        members = frozenset(names)
        targets = tuple(self._engines[name].target for name in names)
        if self._method == "broadcast":
            targets = one_after_the_other(targets)
        new_group = members != self._grouped
        self._grouped = frozenset()  # until it is known to stand
        update = WeightUpdate(version, targets, self._method, self._bucket_bytes, new_group=new_group)
        try:
            await send(update)
        except EnginesMissedUpdate as error:
            missed = tuple(str(name) for name in error.fields.get("engines", ()))
            return versions.SendFailed(missed, f"{error.what}: {error.evidence}"), None
        except Exception as error:  # noqa: BLE001  # whatever ended the trainer's call, the engines come to a known end
            return versions.SendFailed((), f"the trainer did not send its weights: {error}"), error
        self._grouped = members
        return versions.Sent(), None

    def _none_left(self, version: int) -> NoEngineLeft:
        return NoEngineLeft(
            f"no engine took weight version {version}",
            evidence="\n".join(f"{name}: {why}" for name, why in self.failures.items()) or "all had failed before",
            advice="Read the engines' logs; the first error in one is usually the cause.",
            engines=list(self.failures),
        )


def one_after_the_other(targets: tuple[EngineTarget, ...]) -> tuple[EngineTarget, ...]:
    """With places in a process group that has no gaps, also where some engines are gone."""
    placed, offset = [], 1
    for target in targets:
        placed.append(replace(target, rank_offset=offset))
        offset += target.tp_size
    return tuple(placed)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``UpdateRunner`` from the run's configuration."""
    return {
        "mode": config.get("pause_generation_mode") or "retract",
        "method": "tensor" if config.get("colocate") else "broadcast",
        "bucket_bytes": int(config.get("update_weight_buffer_size") or 512 << 20),
    }
