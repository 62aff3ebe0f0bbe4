"""The processes of a training job: the rollout manager, the trainer's ranks, the engines behind their router.

Consumes: the resolved config and a running controller. Produces: handles, all ready. Waits for: processes to come up
(bounded), models to load (bounded). Invariant: either everything that the config needs is up when ``start`` returns, or
it raises and the controller's context ends what had been started.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.backends.checkpoint_layout import find_checkpoint
from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.places import fleet_places
from miles.training.errors import CheckpointsDisagree, first_of
from miles.training.recovery import Recovery, Starts, pinned
from miles_agents.rpc.mesh import ActorMesh
from miles_controller import Controller, OwnedMesh, Placement, Policy, Request

LOAD_S = 3600.0
"""For loading a model, saving it, exporting it: what is bound by a disk."""
LONG_S = 7 * 24 * 3600.0
"""For generating and training, whose length is the user's choice. What ends a hang is another condition: a death, the
collectives' own timeout (``--distributed-timeout-minutes``), the user."""

ROLLOUT_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of the rollout manager."""
_PRELOAD = {
    "megatron": "miles.backends.megatron_utils.preload",
    "fsdp": "miles.backends.fsdp_utils.preload",
}


def preload(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Modules that the trainer's ranks are forked with, for ``LocalAgents``, too: then they are imported while the node
    joins. None where ranks are not forked: with GPUs."""
    if config["device"] != "cpu" or config["debug_rollout_only"]:
        return None
    return (_PRELOAD[config["train_backend"]],)


@dataclass
class Parts:
    """What the loop works with. Without engines (``--debug-train-only``) ``fleet`` is None, without training
    (``--debug-rollout-only``) ``trainer`` is."""

    rollout: OwnedMesh
    trainer: OwnedMesh | None
    fleet: EngineFleet | None
    start_rollout_id: int
    num_rollout_per_epoch: int | None
    weight_version: int = 0
    """The last one of the run that is resumed."""
    num_too_long: int = 0
    """Prompts that were left out because they leave no room for an answer."""
    recovery: Recovery | None = None
    """With ``--use-fault-tolerance``: what keeps trainer and rollout manager alive."""

    def calls(self, mesh: ActorMesh, timeout_s: float = LONG_S) -> Any:
        """The mesh with a deadline for its calls, which outlast deaths if there is recovery."""
        if self.recovery is not None:
            return self.recovery.calls(mesh.name, timeout_s)
        return mesh.options(timeout_s=timeout_s)

    def now(self, mesh: ActorMesh) -> ActorMesh:
        """The processes as they are: calls of these do not outlast a death, and begin nobody anew."""
        return mesh if self.recovery is None else self.recovery.mesh(mesh.name)


def placement_requests(config: Mapping[str, Any]) -> list[Request]:
    """What the job needs of nodes: the trainer's ranks and the engines' devices, shared if colocated."""
    requests = []
    on_cpu = config["device"] == "cpu"
    # Cores are shared more readily than GPUs: where there are too few, ranks and engines take turns on them.
    oversubscribe = on_cpu
    if not config["debug_rollout_only"]:
        per_node = config["actor_num_gpus_per_node"] if config.get("num_nodes", 1) != 1 else None
        requests.append(Request("trainer", config["world_size"], ranks_per_node=per_node, oversubscribe=oversubscribe))
    if not config["debug_train_only"] and not config.get("rollout_external"):
        colocated = config["colocate"] and not config["debug_rollout_only"]
        # Groups of engines of several sizes take their devices one by one.
        grouped = bool(config.get("engine_groups"))
        requests.append(
            Request(
                "engines",
                config["rollout_num_gpus"] if grouped else config["rollout_num_engines"],
                devices_per_rank=1 if grouped else config["rollout_num_gpus_per_engine"],
                colocate_with="trainer" if colocated else None,
                kind="service",
                oversubscribe=oversubscribe and not colocated,
            )
        )
    return requests


async def start(controller: Controller, config: dict[str, Any]) -> Parts:
    """Start everything that the config asks for, all at once.

    Raises:
        MilesError: Of whatever did not come up; the first cause if several did not.
    """
    placement = controller.place(placement_requests(config))
    fleet = None
    if not config["debug_train_only"]:
        places = fleet_places(config, placement)
        settings = {**config, "seed": engine_seed(config)}
        fleet = EngineFleet(controller, settings, places=places)
    try:
        return await _start(controller, config, placement, fleet)
    except BaseException:
        if fleet is not None:
            await fleet.stop()
        raise


async def _start(
    controller: Controller, config: dict[str, Any], placement: Placement, fleet: EngineFleet | None
) -> Parts:
    try:
        if fleet is not None and fleet.is_external:
            await fleet.start()  # what is wrong with engines that run already is told before anything else starts
        elif fleet is not None and config["offload_rollout"] and config["device"] == "cuda":
            # An engine sizes its cache by the memory that it finds free: all of it, before the trainer comes.
            await fleet.start()
            await fleet.release()
        if config.get("use_fault_tolerance"):
            config = pinned(config)
        async with asyncio.TaskGroup() as group:
            rollout = group.create_task(_start_rollout(controller, config))
            trainer = group.create_task(_start_trainer(controller, config, placement))
            if fleet is not None and not fleet.targets:
                group.create_task(fleet.start())
    except BaseExceptionGroup as errors:
        raise first_of(errors) from None
    mesh, start_rollout_id = trainer.result()
    parts = Parts(rollout.result(), mesh, fleet, start_rollout_id, None)
    facts = await _init_rollout(parts.rollout, fleet)
    parts.num_rollout_per_epoch = facts["num_rollout_per_epoch"]
    parts.num_too_long = facts.get("num_too_long") or 0
    if start_rollout_id > 0 and config["load"]:
        await _load_rollout_state(parts, config)
        parts.weight_version = await parts.calls(parts.rollout, LOAD_S).restored_weight_version.call_one()
    if config.get("use_fault_tolerance"):
        parts.recovery = _recovery(controller, config, placement, parts)
        await parts.recovery.begin()
    return parts


def _recovery(controller: Controller, config: Mapping[str, Any], placement: Placement, parts: Parts) -> Recovery:
    starts = Starts(
        trainer=lambda changed: _spawn_trainer(controller, changed, placement),
        init_trainer=_init_trainer,
        rollout=lambda: _start_rollout(controller, config),
        init_rollout=lambda mesh: _init_rollout(mesh, parts.fleet),
    )
    return Recovery(
        controller, config, starts,
        rollout=parts.rollout, trainer=parts.trainer, fleet=parts.fleet, start=parts.start_rollout_id,
    )  # fmt: skip


def engine_seed(config: Mapping[str, Any]) -> int:
    """``--seed``, but another one for each point at which a run is resumed: else engines would draw again what they
    drew at its begin."""
    found = None
    if config["load"] and not config.get("finetune"):
        found = find_checkpoint(config["load"], config.get("ckpt_step"))
    resumed = 0 if found is None or found.rollout_id is None else found.rollout_id + 1
    return int((config["seed"] + 1_000_003 * resumed) % 2**31)


async def _init_rollout(mesh: OwnedMesh, fleet: EngineFleet | None) -> dict[str, Any]:
    """The rollout manager knows its engines and has loaded its prompts: facts about these."""
    engines = [] if fleet is None else fleet.targets
    url, key = ("", "") if fleet is None else (fleet.router_url, fleet.api_key)
    facts: dict[str, Any] = await mesh.options(timeout_s=LOAD_S).start.call_one(engines, url, key)
    return facts


async def _start_rollout(controller: Controller, config: Mapping[str, Any]) -> OwnedMesh:
    return await controller.spawn(
        "rollout",
        "miles.rollout.manager:RolloutManager",
        config,
        devices_per_rank=0,
        policy=Policy(stopped_timeout_s=_stop_timeout(config)),
        env=ROLLOUT_ENV,
        start_timeout_s=300.0,
        start_method="exec",  # user code decides what is imported here
    )


def _stop_timeout(config: Mapping[str, Any]) -> float | None:
    """How long a process may be stopped. Where nobody would bring it back, it is reported only."""
    return float(config["recovery_stop_timeout"]) if config.get("use_fault_tolerance") else None


async def _start_trainer(
    controller: Controller, config: Mapping[str, Any], placement: Placement
) -> tuple[OwnedMesh | None, int]:
    if config["debug_rollout_only"]:
        return None, config["start_rollout_id"] or 0
    trainer = await _spawn_trainer(controller, config, placement)
    return trainer, await _init_trainer(trainer, config)


async def _spawn_trainer(controller: Controller, config: Mapping[str, Any], placement: Placement) -> OwnedMesh:
    size = config["world_size"]
    local = [slots[0].local_rank for slots in placement.slots["trainer"]]
    on_cpu = config["device"] == "cpu"

    def rank_env(rank: int) -> dict[str, str]:
        env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local[rank])}
        return env if on_cpu else {**env, "CUDA_VISIBLE_DEVICES": "own"}

    return await controller.spawn(
        "trainer",
        "miles.backends.trainer:Trainer",
        dict(config),
        dims={"gpus": size},
        placement=placement,
        policy=Policy("kill_group", stopped_timeout_s=_stop_timeout(config)),
        env=trainer_env(config),
        rank_env=rank_env,
        start_timeout_s=300.0,
        preload=preload(config),
    )


async def _init_trainer(trainer: OwnedMesh, config: Mapping[str, Any]) -> int:
    """The ranks meet and load; the first rollout."""
    host, port = await trainer.slice(gpus=0).options(timeout_s=60.0).rendezvous.call_one()
    answers = await trainer.options(timeout_s=LOAD_S).init.call(host, port)
    starts = {int(answer["start_rollout_id"]) for answer in answers.values}
    if len(starts) != 1:
        raise CheckpointsDisagree(
            "the trainer's ranks would begin at different rollouts",
            evidence=", ".join(f"rank {point['gpus']}: {a['start_rollout_id']}" for point, a in answers.items()),
            advice="Make sure that all nodes see the same --load directory.",
        )
    given = config["start_rollout_id"]
    return starts.pop() if given is None else int(given)


def trainer_env(config: Mapping[str, Any], inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of the trainer's ranks, beyond those that differ by rank and those that they inherit. An agent that has
    them, too, forks ranks from the zygote that it warmed up while it joined."""
    env = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"} if config["device"] == "cpu" else {}
    if config["device"] == "cuda" and not config.get("colocate"):
        # As SGLang has it in its own processes: NCCL joins no group of ranks that differ in it.
        symmetric = bool(config.get("sglang_enable_symm_mem"))  # there SGLang sets it, whatever it finds
        if symmetric or "NCCL_CUMEM_ENABLE" not in inherited:
            env = {"NCCL_CUMEM_ENABLE": "1" if symmetric else "0"}
    if config["device"] == "cuda" and config.get("deterministic_mode"):
        # What cuBLAS and NCCL read when they start; torch asks for the first one.
        env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    typed = {str(name): str(value) for name, value in (config.get("train_env_vars") or {}).items()}
    return {**env, **typed}


async def _load_rollout_state(parts: Parts, config: Mapping[str, Any]) -> None:
    """Data position, buffer and ledger as they were when the trainer's checkpoint was written."""
    directory = config["load"]
    found = await parts.calls(parts.rollout, LOAD_S).load.call_one(parts.start_rollout_id - 1, directory)
    if not found and config["start_rollout_id"] is None:
        raise CheckpointsDisagree(
            f"there is no rollout state beside the checkpoint of rollout {parts.start_rollout_id - 1}",
            evidence=f"looked below {Path(directory) / 'rollout'}",
            advice="Load a checkpoint whose rollout state is there, or give --start-rollout-id to begin the data anew.",
        )
