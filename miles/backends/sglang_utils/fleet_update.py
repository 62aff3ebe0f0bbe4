"""Carries out what ``weight_versions`` decides: the transaction that gives all engines new weights. No torch.

Waits for: engines, each call with a deadline and for as long as they give signs of life; the trainer, whose call the
owner of ``send`` bounds, and which waits for engines in the same way: one that hangs is fenced, which ends it.
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
from miles.backends.sglang_utils.liveness import silence_of, while_alive
from miles.backends.sglang_utils.server_arguments import takes_stream
from miles.backends.weight_update.failures import EnginesMissedUpdate
from miles.backends.weight_update.messages import EngineTarget, UpdateMethod, WeightUpdate
from miles_agents.errors import MilesError, PeerFault
from miles_controller import weight_versions as versions
from miles_controller.weight_versions import Step

logger = logging.getLogger(__name__)
Send = Callable[[WeightUpdate], Awaitable[Any]]
STEP_S = 600.0
"""Deadline of each step of an update, and of each bucket, at an engine (``--update-weight-timeout``)."""
SILENCE_S = 60.0
"""How long an engine may say nothing at all meanwhile (``--update-weight-silence-timeout``)."""


class NoEngineLeft(PeerFault):
    """No engine has come through a weight update."""

    code = "E-ENG-007"


class Fences(Protocol):
    """What takes an engine out."""

    async def __call__(self, engine: Engine, why: str) -> None:
        """Nothing comes from or goes to this engine any more."""


class UpdateRunner:
    """Keeps the versions of a fleet's engines, and runs one update at a time."""

    def __init__(
        self,
        *,
        mode: PauseMode,
        method: UpdateMethod,
        bucket_bytes: int,
        fence: Fences,
        are_judged: Callable[[], bool] = lambda: True,
        timeout_s: float = STEP_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.state = versions.Versions()
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        """Of the last update, by step."""
        self._engines: dict[str, Engine] = {}
        self.mode: PauseMode = mode
        self._method: UpdateMethod = method
        self._bucket_bytes = bucket_bytes
        self._fence = fence
        self._are_judged = are_judged
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._grouped: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    def joined(self, engine: Engine, version: int | None) -> None:
        """A new engine that holds this version."""
        self._engines[engine.target.name] = engine
        self.state, _ = versions.step(self.state, versions.Joined(engine.target.name, version))

    async def failed(self, engine: Engine, why: str) -> None:
        """An engine has died. An update that is under way finds that out by itself, and is waited for."""
        async with self._lock:
            if self._engines.get(engine.target.name) is engine:
                await self._take(versions.EngineFailed(engine.target.name, why), None)

    async def replaced(self, engine: Engine, version: int | None) -> None:
        """Another process lives under a name that was known. Waits for an update that is under way."""
        name = engine.target.name
        async with self._lock:
            before = self._engines.get(name)
            if before is not None:
                await self._take(versions.EngineFailed(name, "its place is taken by another"), None)
                self._grouped = frozenset()  # the group of this name's earlier life is gone with it
            self.joined(engine, version)

    def holds(self, name: str) -> versions.Holds | None:
        """What an engine has; None: it is not known."""
        return self.state.engines.get(name)

    async def update(self, send: Send, version: int | None = None) -> int:
        """One update to ``version`` (default: the next). Returns it.

        Raises:
            NoEngineLeft: with every engine's failure.
            What ``send`` raises, if it is no failure of engines: nobody knows what they hold, so all are fenced.
        """
        async with self._lock:
            wanted = self.state.version + 1 if version is None else version
            await self._run(versions.Begin(wanted), send)
            return wanted

    async def catch_up(self, send: Send) -> None:
        """Give stale engines the committed version, which the trainer has to have still. Others generate meanwhile.

        Raises:
            As ``update``; NoEngineLeft: none of the stale ones has come through it.
        """
        async with self._lock:
            if versions.Holds.STALE in self.state.engines.values():
                await self._run(versions.CatchUp(), send)

    async def _run(self, begin: versions.Begin | versions.CatchUp, send: Send) -> None:
        self.failures, self.seconds = {}, {}
        error = await self._take(begin, send)
        if error is not None:
            raise error

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
            call = self._call(step, engine, version)
            await while_alive(call, engine.client, silence_s=self._silence_s, timeout_s=self._timeout_s)
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
                if self._are_judged():
                    await engine.service.resume()
            case _:
                pass

    async def _send(
        self, send: Send | None, names: tuple[str, ...], version: int
    ) -> tuple[versions.Event, BaseException | None]:
        """Have the trainer send to these engines. A broadcast that breaks leaves those that were no cause of it without
        the rest: they are sent everything again."""
        assert send is not None
        missed: dict[str, str] = {}
        watches = {name: asyncio.ensure_future(self._fence_if_silent(self._engines[name])) for name in names}
        try:
            while True:
                members = tuple(name for name in names if name not in missed and self._takes_part(name))
                if not members:
                    break
                try:
                    await self._send_once(send, members, version)
                    break
                except EnginesMissedUpdate as error:
                    why = f"{error.what}: {error.evidence}"
                    missed |= {str(name): why for name in error.fields.get("engines") or members}
                    if self._method != "broadcast":
                        break
                except Exception as error:  # noqa: BLE001  # whatever ended it, the engines come to a known end
                    return versions.SendFailed((), f"the trainer did not send its weights: {error}"), error
        finally:
            for name, watch in watches.items():
                if self._takes_part(name):  # else it is being fenced
                    watch.cancel()
            await asyncio.gather(*watches.values(), return_exceptions=True)
        if missed:
            return versions.SendFailed(tuple(missed), "; ".join(dict.fromkeys(missed.values()))), None
        return versions.Sent(), None

    async def _send_once(self, send: Send, names: tuple[str, ...], version: int) -> None:
        members = frozenset(names)
        targets = tuple(self._engines[name].target for name in names)
        if self._method == "broadcast":
            targets = one_after_the_other(targets)
        new_group = members != self._grouped
        self._grouped = frozenset()  # until it is known to stand
        await send(
            WeightUpdate(
                version,
                targets,
                self._method,
                self._bucket_bytes,
                new_group=new_group,
                timeout_s=self._timeout_s,
            )
        )
        self._grouped = members

    def _takes_part(self, name: str) -> bool:
        return self.state.update is not None and name in self.state.update.engines

    async def _fence_if_silent(self, engine: Engine) -> None:
        """While the trainer sends: killing an engine that hangs ends the trainer's waiting for it."""
        error = await silence_of(engine.client, self._silence_s)
        await self._take(versions.EngineFailed(engine.target.name, f"{error.what}: {error.evidence}"), None)

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


def settings(config: Mapping[str, Any], *, on_one_node: bool = True) -> dict[str, Any]:
    """Arguments of ``UpdateRunner`` from the run's configuration. On a CPU, what is handed over is the memory of the
    trainer's first rank, which other nodes cannot map, nor engines that take no streams; on GPUs each rank hands over
    its own."""
    kinds: list[dict[str, Any]] = [{"speculative_algorithm": config.get("sglang_speculative_algorithm")}]
    kinds += [kinds[0] | dict(group.get("overrides") or {}) for group in config.get("engine_groups") or ()]
    can_map = on_one_node and all(takes_stream(kind) for kind in kinds)
    shares = config.get("colocate") and (can_map or config["device"] == "cuda")
    return {
        "mode": config.get("pause_generation_mode") or "retract",
        "method": "tensor" if shares else "broadcast",
        "bucket_bytes": int(config.get("update_weight_buffer_size") or 512 << 20),
        "timeout_s": float(config.get("update_weight_timeout") or STEP_S),
        "silence_s": float(config.get("update_weight_silence_timeout") or SILENCE_S),
    }
