"""``--dry-run``: where everything would run, with which command lines, ports and environment. Starts nothing.

What is shown comes from the code that a run uses: the placement of the controller, the arguments of engines and
router. Ports are leased when a process starts, so they have names here and no numbers. Values that the user gave for
variables are not shown: they may be secrets.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_OK
from miles_agents.agent.inventory import DriverNvml, gpu_notices, inventory_notices, take_inventory
from miles_agents.errors import MilesError
from miles_agents.node_info import NodeInfo
from miles_controller.config import forwarded_environment
from miles_controller.placement import Inventory, Placement, place

NODE = "node-0"
HIDDEN = "***"
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        name: Its own.
        node: Where.
        devices: Indices of its GPUs or CPU slots.
        ports: Names of the ports that its agent would lease.
        command: Its command line.
        env: How its environment differs from its agent's; the agent's from that of this process.
    """

    name: str
    node: str
    devices: tuple[int, ...]
    ports: tuple[str, ...]
    command: tuple[str, ...]
    env: Mapping[str, str]


def show_plan(config: dict[str, Any], out: Console) -> int:
    """Write the plan; returns 0, or 2 if it cannot be carried out."""
    from miles.training.parts import placement_requests

    on_cpu = config["device"] == "cpu"
    try:
        info = take_inventory(
            NODE, cpu_slots=config["cpu_slots"] or None, interface=None, nvml=None if on_cpu else DriverNvml()
        )
        nodes = nodes_like(info, config["machines"]) or [info]
        placement = place(Inventory.of(nodes), placement_requests(config))
        processes = list(plan(config, placement))
    except MilesError as error:
        out.print(Text(str(error), style="bold red"))
        return EXIT_BAD_CONFIG
    _write(config, info, placement, processes, out)
    return EXIT_OK


def nodes_like(here: NodeInfo, machines: Sequence[Mapping[str, Any]]) -> list[NodeInfo]:
    """Machines are not asked: each is taken to be like this one, with the slots that the hostfile gives it."""
    found = []
    for machine in machines:
        slots = machine["slots"]
        if here.gpus:
            found.append(replace(here, node=machine["name"], gpus=here.gpus[:slots]))
        else:
            found.append(replace(here, node=machine["name"], cpu_slots=slots or here.cpu_slots))
    return found


def plan(config: dict[str, Any], placement: Placement) -> Iterator[Process]:
    """All processes, in the order in which they start."""
    from miles.training.parts import ROLLOUT_ENV, trainer_env

    worker = (sys.executable, "-m", "miles_agents.worker")
    own = {**config["env"], **trainer_env(config)}
    of_agent = {**os.environ, **own}

    def differs(env: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in env.items() if of_agent.get(name) != value}

    yield Process("controller", "here", (), ("status",), (sys.executable, "train.py"), {})
    for node in [machine["name"] for machine in config["machines"]] or [NODE]:
        agent = (sys.executable, "-m", "miles_launcher.cli", "agent", "--node", node)
        yield Process(f"agent of {node}", node, (), (), agent, own)
    yield Process("rollout manager", placement.head or NODE, (), (), worker, differs(ROLLOUT_ENV))
    for process in _engines(config, placement):
        yield replace(process, env=differs(process.env))
    for rank, slots in enumerate(placement.slots.get("trainer", ())):
        env = {"RANK": str(rank), "WORLD_SIZE": str(config["world_size"]), "LOCAL_RANK": str(slots[0].local_rank)}
        ports = ("rendezvous",) if rank == 0 else ()
        devices = slots[0].devices
        if config["device"] != "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        yield Process(f"trainer rank {rank}", slots[0].node, devices, ports, worker, differs(trainer_env(config) | env))


def _engines(config: dict[str, Any], placement: Placement) -> Iterator[Process]:
    engines = placement.slots.get("engines", ())
    if not (engines or config["rollout_external"]):
        return
    import json

    from miles.backends.sglang_utils.environment import engine_environment
    from miles.backends.sglang_utils.server_arguments import (
        engine_size,
        router_arguments,
        server_arguments,
        slots_of_engines,
    )

    launch = (sys.executable, "-m", "miles.backends.sglang_utils.launch_router", _HOST, "PORTS")
    if not config["sglang_router_ip"]:
        yield Process(
            "router",
            placement.head or NODE,
            (),
            ("http", "metrics"),
            (*launch, json.dumps(router_arguments(config))),
            {},
        )
    launch = (sys.executable, "-m", "miles.backends.sglang_utils.launch_engine", _HOST, "PORTS")
    for rank, slots in enumerate(slots_of_engines(config, engines)):
        devices = tuple(device for slot in slots for device in slot.devices)
        env = engine_environment(
            config["device"],
            index=rank,
            tp_size=engine_size(config, rank),
            colocate=config["colocate"],
            inherited={**os.environ, **config["env"]},
            device_ids=[str(device) for device in devices],
        )
        arguments = json.dumps(server_arguments(config, rank))
        yield Process(f"engine {rank}", slots[0].node, devices, ("http", "nccl"), (*launch, arguments), env)


def _write(
    config: Mapping[str, Any], info: NodeInfo, placement: Placement, processes: list[Process], out: Console
) -> None:
    kind = "CPU slot" if config["device"] == "cpu" else "GPU"
    out.print(Text(f"run directory {config['run_dir']}, device {config['device']}, {config['params_dtype']}"))
    if config["machines"]:
        out.print(Text("note: hosts are not asked: each is taken to be like this machine", style="dim"))
    for notice in [*inventory_notices(info), *gpu_notices(DriverNvml(), info)]:
        out.print(Text(f"note: {notice}", style="dim"))
    table = Table(title="placement", title_justify="left")
    for title in ("process", "node", f"{kind}s", "ports (leased at the start)"):
        table.add_column(title)
    for process in processes:
        table.add_row(
            process.name, process.node, " ".join(map(str, process.devices)) or "-", ", ".join(process.ports) or "-"
        )
    out.print(table)
    if placement.shared:
        out.print(Text(f"{' and '.join(placement.shared)} share {kind}s: there are {info.cores} CPU cores"))
    given = {**config["env"], **config["train_env_vars"]}
    forwarded = sorted({*forwarded_environment(), *config["env"]})
    out.print(Text(f"variables of this shell and of --env that all processes get: {' '.join(forwarded) or 'none'}"))
    for process in processes:
        env = [f"{name}={HIDDEN if name in given else shlex.quote(value)}" for name, value in process.env.items()]
        out.print(Text(f"\n{process.name}:", style="bold"))
        out.print(Text("  " + " ".join([*env, shlex.join(process.command)])))
