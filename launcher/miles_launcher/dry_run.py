"""``--dry-run``: where everything would run, with which command lines, ports and environment. Starts nothing.

What is shown comes from the code that a run uses: the placement of the controller, the arguments of engines and
router, the commands of launchers. No other machine is asked: a node of a cluster has the devices that the flags, the
hostfile or Slurm give it. Ports are leased when a process starts, so they have names here and no numbers. Values that
the user gave for variables are not shown: they may be secrets.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.tracking.secrets import shown_argv
from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_OK
from miles_agents.agent.inventory import DriverNvml, gpu_notices, inventory_notices, take_inventory
from miles_agents.errors import MilesError
from miles_agents.node_info import Gpu, NodeInfo, default_cpu_slots
from miles_controller.config import forwarded_environment
from miles_controller.placement import Inventory, Placement, place

NODE = "node-0"
HIDDEN = "***"
ASSUMED_GPUS = 8
UNKNOWN = "unknown"
_HOST = "127.0.0.1"
_ADDRESS = "tcp://ADDRESS:PORT"
_NODE_ADDRESS = "ADDRESS"


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


def show_plan(config: dict[str, Any], out: Console, argv: Sequence[str] = ()) -> int:
    """Write the plan; returns 0, or 2 if it cannot be carried out. ``argv``: the flags as they were given."""
    from miles.training.parts import placement_requests

    try:
        nodes = nodes_of(config)
        placement = place(Inventory.of(nodes.values()), placement_requests(config))
        processes = list(plan(config, placement, argv))
    except MilesError as error:
        out.print(Text(str(error), style="bold red"))
        return EXIT_BAD_CONFIG
    _write(config, nodes, placement, processes, out)
    return EXIT_OK


def nodes_of(config: Mapping[str, Any]) -> dict[str, NodeInfo]:
    """What there is to place on: this machine as it is, or nodes as the flags describe them."""
    on_cpu = config["device"] == "cpu"
    if config["launcher"] == "local":
        nvml = None if on_cpu else DriverNvml()
        return {NODE: take_inventory(NODE, cpu_slots=config["cpu_slots"] or None, interface=None, nvml=nvml)}
    return {machine["name"]: _described(machine, config, on_cpu=on_cpu) for machine in config["machines"]}


def _described(machine: Mapping[str, Any], config: Mapping[str, Any], *, on_cpu: bool) -> NodeInfo:
    known = machine["slots"] or config["num_gpus_per_node"] or (config["cpu_slots"] if on_cpu else None)
    slots = known or (default_cpu_slots(1) if on_cpu else ASSUMED_GPUS)
    gpus = [Gpu(index, f"GPU-{index}", "GPU" if known else UNKNOWN, 0) for index in range(0 if on_cpu else slots)]
    return NodeInfo(
        node=machine["name"],
        hostname=machine["host"],
        addresses=(machine["host"],),
        gpus=tuple(gpus),
        cpu_slots=slots if on_cpu else 0,
        cores=slots,
        memory_bytes=0,
        python=platform.python_version(),
        platform="",
    )


def _starts_of_agents(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By node, the command with which its agent is started."""
    agent = (sys.executable, "-m", "miles_launcher.cli", "agent")
    names = [machine["name"] for machine in config["machines"]]
    if config["launcher"] == "local":
        return {NODE: (*agent, "--node", NODE)}
    if config["launcher"] == "ssh":
        from miles_launcher.ssh_start import Machine, Ssh, python_of

        ssh, machines = Ssh(config["ssh_config"]), [Machine(**machine) for machine in config["machines"]]
        # What ssh really starts is a loader that checks the host first and is then replaced by this.
        rest = shlex.join(("-m", "miles_launcher.cli", "agent", "--controller", _ADDRESS))
        python = config["remote_python"]
        return {m.name: ssh.command(m, f"{python_of(m, python)} {rest} --node {m.name}") for m in machines}
    if config["launcher"] == "slurm":
        from miles_launcher.slurm import found_allocation, srun

        job = found_allocation(os.environ)
        return {name: (*srun(job, name), *agent, "--controller", _ADDRESS, "--node", name) for name in names}
    keys = f"{config['run_dir']}/join"
    return {name: ("miles", "agent", "--controller", _ADDRESS, "--key-file", f"{keys}/{name}.key") for name in names}


def plan(config: dict[str, Any], placement: Placement, argv: Sequence[str] = ()) -> Iterator[Process]:
    """All processes, in the order in which they start."""
    from miles.training.parts import ROLLOUT_ENV, trainer_env

    worker = (sys.executable, "-m", "miles_agents.worker")
    own = {**config["env"], **trainer_env(config)}
    of_agent = {**os.environ, **own}

    def differs(env: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in env.items() if of_agent.get(name) != value}

    listens = ("status",) if config["launcher"] == "local" else ("status", "agents")
    yield Process("controller", "here", (), listens, (sys.executable, "train.py", *shown_argv(argv)), {})
    for node, command in _starts_of_agents(config).items():
        yield Process(f"agent of {node}", node, (), (), command, own)
    yield Process("rollout manager", placement.head, (), (), worker, differs(ROLLOUT_ENV))
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
    from miles.backends.sglang_utils.places import engine_parts
    from miles.backends.sglang_utils.server_arguments import (
        engine_size,
        router_arguments,
        server_arguments,
        slots_of_engines,
    )

    host = _HOST if config["launcher"] == "local" else _NODE_ADDRESS
    launch = (sys.executable, "-m", "miles.backends.sglang_utils.launch_router", host, "PORTS")
    if not config["sglang_router_ip"]:
        yield Process(
            "router",
            placement.head,
            (),
            ("http", "metrics"),
            (*launch, json.dumps(router_arguments(config))),
            {},
        )
    launch = (sys.executable, "-m", "miles.backends.sglang_utils.launch_engine", host, "PORTS")
    for rank, slots in enumerate(slots_of_engines(config, engines)):
        parts = engine_parts(rank, slots)
        for number, part in enumerate(parts):
            env = engine_environment(
                config["device"],
                index=rank,
                tp_size=engine_size(config, rank),
                colocate=config["colocate"],
                inherited={**os.environ, **config["env"]},
                device_ids=[str(device) for device in part.devices],
            )
            spans = {"nnodes": len(parts), "node_rank": number, "dist_init_addr": f"{parts[0].node}:PORT"}
            arguments = json.dumps(server_arguments(config, rank) | (spans if len(parts) > 1 else {}))
            name = f"engine {rank}" + (f", part {number}" if len(parts) > 1 else "")
            ports = ("http", "nccl", *(("meeting",) if len(parts) > 1 and number == 0 else ()))
            yield Process(name, part.node or NODE, part.devices, ports, (*launch, arguments), env)


def _write(
    config: Mapping[str, Any],
    nodes: Mapping[str, NodeInfo],
    placement: Placement,
    processes: list[Process],
    out: Console,
) -> None:
    kind = "CPU slot" if config["device"] == "cpu" else "GPU"
    out.print(Text(f"run directory {config['run_dir']}, device {config['device']}, {config['params_dtype']}"))
    if config["launcher"] == "local":
        for notice in [*inventory_notices(nodes[NODE]), *gpu_notices(DriverNvml(), nodes[NODE])]:
            out.print(Text(f"note: {notice}", style="dim"))
    else:
        _write_nodes(config, nodes, placement, out)
    table = Table(title="placement", title_justify="left")
    for title in ("process", "node", f"{kind}s", "ports (leased at the start)"):
        table.add_column(title)
    for process in processes:
        table.add_row(
            process.name, process.node, " ".join(map(str, process.devices)) or "-", ", ".join(process.ports) or "-"
        )
    out.print(table)
    if placement.shared:
        cores = sum(info.cores for info in nodes.values())
        out.print(Text(f"{' and '.join(placement.shared)} share {kind}s: there are {cores} CPU cores"))
    given = {**config["env"], **config["train_env_vars"]}
    forwarded = sorted({*forwarded_environment(), *config["env"]})
    out.print(Text(f"variables of this shell and of --env that all processes get: {' '.join(forwarded) or 'none'}"))
    for process in processes:
        env = [f"{name}={HIDDEN if name in given else shlex.quote(value)}" for name, value in process.env.items()]
        out.print(Text(f"\n{process.name}:", style="bold"))
        out.print(Text("  " + " ".join([*env, shlex.join(process.command)])))


def _write_nodes(config: Mapping[str, Any], nodes: Mapping[str, NodeInfo], placement: Placement, out: Console) -> None:
    kind = "CPU slot" if config["device"] == "cpu" else "GPU"
    table = Table(title=f"nodes, by --launcher {config['launcher']}", title_justify="left")
    for title in ("node", "host", f"{kind}s", "used by"):
        table.add_column(title)
    for name, info in nodes.items():
        parts = Counter(request for request, _ in placement.ranks_on(name))
        used = ", ".join(f"{count} of {request}" for request, count in parts.items())
        head = " (head: rollout manager, router)" if name == placement.head else ""
        table.add_row(name, info.hostname, str(len(info.devices)), (used or "nothing") + head)
    out.print(table)
    guessed = [name for name, info in nodes.items() if any(gpu.name == UNKNOWN for gpu in info.gpus)]
    if guessed:
        out.print(
            Text(
                f"note: how many GPUs {', '.join(guessed[:4])}{'...' if len(guessed) > 4 else ''} have is not known "
                f"before they join; {ASSUMED_GPUS} are assumed (--num-gpus-per-node, or slots= in the hostfile)",
                style="dim",
            )
        )
