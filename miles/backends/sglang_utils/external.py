"""Engines that somebody else has started (``--rollout-external``): looked at before they are used, never ended.

Waits for: their answers, each with a deadline. Invariant: what is not fit to be trained with is refused before anything
else of the run has started, all engines' faults at once; at the end an engine generates, and is in no group of ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.backends.sglang_utils.client import EngineClient, EngineRefused, EngineSilent
from miles.backends.sglang_utils.fleet_parts import AGAIN_S, HEARTBEATS, Engine
from miles.backends.weight_update.messages import EngineTarget
from miles_agents.errors import ConfigError, MilesError

logger = logging.getLogger(__name__)
KEY_VARIABLE = "MILES_EXTERNAL_ENGINE_KEY"
"""Variable of the one who starts the run: the API key of the external engines, which no command line shows."""
OLDEST = (0, 5, 16)
ASK_S = 20.0
PROBE_EVERY_S = 5.0
PROBE_S = 30.0
_MISSES = 3
_COMPARED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_EMBEDDING = "model.embed_tokens.weight"
_END_S = 10.0


class ExternalEngineUnfit(ConfigError):
    """An external engine is not there, or cannot be trained with."""

    code = "E-ENG-009"


class ExternalService:
    """Stands for the service that an engine of ours is: tells when it is gone; cannot end it.

    Attributes:
        phase: ``ready``, ``paused``, ``fenced``, ``lost`` (it has stopped answering), ``dead`` (it was let go).
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        probe_every_s: float = PROBE_EVERY_S,
        probe_s: float = PROBE_S,
        first_wait_s: float = 0.0,
        again_s: float | None = None,
        misses: int = _MISSES,
    ) -> None:
        self.name = client.name
        self.phase = "ready"
        self.fault = ""
        self.log = f"the log of the engine at {client.url}, where it was started"
        self._client = client
        self._changed = asyncio.Event()
        self._misses = misses
        self._again_s = probe_every_s if again_s is None else again_s
        self._first_wait_s = self._waits_s = first_wait_s
        self._probing = asyncio.ensure_future(self._probe(probe_every_s, probe_s))

    async def pause(self) -> None:
        """Do not ask after it until ``resume``."""
        self._enter("paused", self.phase == "ready")

    async def resume(self) -> None:
        """Ask after it again, not before the first wait is over."""
        self._waits_s = self._first_wait_s
        self._enter("ready", self.phase == "paused")

    async def fence(self, why: str) -> None:
        """It counts no more. It runs on, as it is somebody else's."""
        self.fault = why
        self._enter("fenced", self.phase != "dead")
        self._probing.cancel()

    async def stop(self, why: str = "") -> None:
        """Let it go."""
        self._probing.cancel()
        await asyncio.gather(self._probing, return_exceptions=True)
        self._enter("dead", True)

    async def wait_for_phase(self, *phases: str, timeout_s: float) -> str:
        """Until it is in one of these phases; returns which. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.phase not in phases:
                self._changed.clear()
                await self._changed.wait()
        return self.phase

    def _enter(self, phase: str, may: bool) -> None:
        if may:
            self.phase = phase
            self._changed.set()

    async def _probe(self, every_s: float, probe_s: float) -> None:
        misses = 0
        while misses < self._misses:
            wait_s, self._waits_s = max(self._again_s if misses else every_s, self._waits_s), 0.0
            await asyncio.sleep(wait_s)
            if self.phase != "ready" or self._waits_s:
                continue
            try:
                await self._client.call("GET", "/health", timeout_s=probe_s)
                misses = 0
            except (EngineSilent, EngineRefused) as error:
                misses += 1
                self.fault = f"{error.what}: {error.evidence}"
        self._enter("lost", self.phase == "ready")


def probe_timing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``ExternalService``: with ``--use-fault-tolerance`` as the flags say."""
    if not config.get("use_fault_tolerance"):
        return {}
    return {
        "probe_every_s": float(config["rollout_health_check_interval"]),
        "probe_s": float(config["rollout_health_check_timeout"]),
        "first_wait_s": float(config["rollout_health_check_first_wait"]),
        "again_s": AGAIN_S,
        "misses": HEARTBEATS,
    }


def external_key() -> str:
    """The engines' key; empty: they have none."""
    return os.environ.get(KEY_VARIABLE, "")


async def adopt(config: Mapping[str, Any], api_key: str) -> list[Engine]:
    """All external engines, ready to be used.

    Raises:
        ExternalEngineUnfit: With everything that is wrong with any of them.
    """
    vocab_size = config["hf_config"].get("vocab_size")
    clients = [
        EngineClient(f"http://{address}", api_key, name=f"external-{rank}", vocab_size=vocab_size)
        for rank, address in enumerate(config["rollout_external_engine_addrs"])
    ]
    try:
        return await _adopted(clients, config, api_key)
    except BaseException:
        for client in clients:
            await client.close()
        raise


async def _adopted(clients: Sequence[EngineClient], config: Mapping[str, Any], api_key: str) -> list[Engine]:
    looks = await asyncio.gather(*(look_at(client, config) for client in clients))
    found = {client.url: faults for client, (_, faults) in zip(clients, looks, strict=True) if faults}
    if found:
        raise ExternalEngineUnfit(
            f"{len(found)} of {len(clients)} external engines cannot be used",
            evidence="\n".join(f"{url}: {fault}" for url, faults in found.items() for fault in faults),
            advice="Start them with the model of --hf-checkpoint, or correct --rollout-external-engine-addrs; an API "
            f"key of theirs is given by the variable {KEY_VARIABLE}.",
        )
    brackets = await asyncio.gather(*(_made_ready(client) for client in clients))
    timing = probe_timing(config)
    engines, offset = [], 1
    for client, (size, _), bracket in zip(clients, looks, brackets, strict=True):
        target = EngineTarget(client.name, client.url, api_key, size, offset, bracket, has_stream=False)
        engines.append(Engine(target, ExternalService(client, **timing), client))
        offset += size
    return engines


async def _made_ready(client: EngineClient) -> bool:
    """It generates, whatever a run before has left it in. Returns whether its updates need brackets."""
    bracket = await client.has_bracket()
    if bracket:
        await client.call("POST", "/end_weight_update", {}, expected=(200, 400))
    await client.resume()
    return bracket


async def let_go(engine: Engine, group_name: str) -> None:
    """At the end of the run: it generates with what it has, and has left our group."""
    try:
        async with asyncio.timeout(_END_S):
            await engine.client.destroy_weights_update_group(group_name)
            await engine.client.resume()
    except (MilesError, TimeoutError) as error:
        logger.warning("%s could not be left as it should be: %s", engine.target.name, error)


async def look_at(client: EngineClient, config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Ranks of an engine, and everything that is wrong with it."""
    try:
        model = dict((await client.call("GET", "/model_info", timeout_s=ASK_S))[1])
        server = dict((await client.call("GET", "/server_info", timeout_s=ASK_S))[1])
        embedding = await _embedding_size(client)
    except (EngineSilent, EngineRefused) as error:
        return 0, [f"{error.what}: {error.evidence}"]
    wanted = config["hf_config"]
    faults = [*_of_server(server, model, config), *_of_model(model, wanted, str(config["hf_checkpoint"]))]
    if embedding and embedding != wanted.get("hidden_size"):
        faults.append(f"its model has hidden size {embedding}, that of --hf-checkpoint {wanted.get('hidden_size')}")
    return int(server.get("tp_size") or 1), faults


async def _embedding_size(client: EngineClient) -> int | None:
    """Width of its embedding, as it lies there; None: its model does not tell."""
    body = {"name": _EMBEDDING, "truncate_size": 1}
    status, rows = await client.call("POST", "/get_weights_by_name", body, timeout_s=ASK_S, expected=(200, 400, 404))
    while isinstance(rows, list) and rows and isinstance(rows[0], list):
        rows = rows[0]
    return len(rows) if status == 200 and isinstance(rows, list) and rows else None


def _of_server(server: Mapping[str, Any], model: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    faults = []
    version = str(server.get("version") or "")
    if _numbers(version) < OLDEST:
        faults.append(f"it is SGLang {version or 'of an unknown version'}; {'.'.join(map(str, OLDEST))} is the oldest")
    faults += [
        f"{name} is {server[name]}: weight updates reach engines that are tensor parallel only"
        for name in ("dp_size", "pp_size")
        if server.get(name, 1) not in (1, None)
    ]
    if str(model.get("disaggregation_mode") or "null") != "null":
        faults.append(f"it does only {model['disaggregation_mode']}: prefill and decode apart are not built yet")
    if not model.get("is_generation", True):
        faults.append("it does not generate")
    if config.get("use_rollout_routing_replay") and not server.get("enable_return_routed_experts"):
        faults.append("it records no experts: start it with --enable-return-routed-experts")
    context, wanted = server.get("context_length"), config.get("rollout_max_context_len")
    if context and wanted and context < wanted:
        faults.append(f"its context has {context} tokens, --rollout-max-context-len is {wanted}")
    return faults


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _of_model(model: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: str) -> list[str]:
    faults = []
    for name in ("model_type", "architectures"):
        told, ours = model.get(name), wanted.get(name)
        if told and ours and told != ours:
            faults.append(f"it serves {name} {_shown(told)}, --hf-checkpoint has {_shown(ours)}")
    path = Path(str(model.get("model_path") or ""))
    try:  # where the disk is shared
        theirs = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return faults
    return faults + [
        f"its model, {path}, has {name} {theirs[name]}, that of --hf-checkpoint, {checkpoint}, {wanted[name]}"
        for name in _COMPARED
        if name in theirs and name in wanted and theirs[name] != wanted[name]
    ]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
